"""Triton kernels and the launchers that start them; installed as `fastheads.kernels`.

This file imports nothing, so that `import fastheads` doesn't load Triton. The modules beside it
import only torch and triton: no autograd, no modules, no choice of implementation.
"""
