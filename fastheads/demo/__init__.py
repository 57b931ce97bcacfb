"""The demo: real handwritten digits in four domains, and a tiny CLIP pretrained on other styles."""
