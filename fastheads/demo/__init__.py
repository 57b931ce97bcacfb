"""The demo: icons that people drew, in four looks, and a small CLIP pretrained on other designers' icons."""
