"""The table of bad input of the losses: what each says to it, before it changes anything."""

import pytest
import torch
from bad_input import NAN, Table, adapted, assert_refused, nothing
from standins import clip, features, seeded
from torch import nn

import fastheads
from fastheads import losses

TABLE = Table()
row = TABLE.row


text_batch, ids = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])


def mmd(features=text_batch, domains=ids, **options):
    return lambda m, t: fastheads.mmd(features, domains, **options)


meta = lambda x: x.to("meta")  # noqa: E731
row("mmd features list", nothing, mmd([1.0]), TypeError, "features", "list")
row("mmd features 1-D", nothing, mmd(torch.ones(4)), ValueError, "features", "(4,)", "[N, D]")
row("mmd features 4-D", nothing, mmd(torch.ones(1, 1, 4, 2)), ValueError, "features", "[L, N, D]")
row("mmd features int", nothing, mmd(text_batch.long()), TypeError, "features", "int64")
row("mmd domains list", nothing, mmd(domains=[0, 0, 1, 1]), TypeError, "domains", "list")
row("mmd domains float", nothing, mmd(domains=ids.float()), TypeError, "domains", "float32", "int64")
row("mmd domains bool", nothing, mmd(domains=ids.bool()), TypeError, "domains", "bool")
row("mmd domains short", nothing, mmd(domains=ids[:3]), ValueError, "domains", "(3,)", "[4]")
row("mmd domains 2-D", nothing, mmd(domains=ids[None]), ValueError, "domains", "(1, 4)")
row("mmd domains device", nothing, mmd(domains=meta(ids)), ValueError, "domains", "meta", "cpu")
row("mmd domains negative", nothing, mmd(domains=ids - 1), ValueError, "domains", "-1")
row("mmd domains too high", nothing, mmd(domains=ids + 1, num_domains=2), ValueError, "domains", "2", "num_domains")
for value in (0, -1, 2.0, True, "2"):
    row(f"mmd num_domains {value!r}", nothing, mmd(num_domains=value), ValueError, "num_domains", repr(value))
row("mmd kernel", nothing, mmd(kernel="gauss"), ValueError, "kernel", "'gauss'", "'adaptive'")
row("mmd kernel None", nothing, mmd(kernel=None), TypeError, "kernel", "None")
row("mmd kernel empty", nothing, mmd(kernel=[]), ValueError, "kernel", "gammas")
row("mmd kernel texts", nothing, mmd(kernel=["1"]), TypeError, "kernel", "'1'")
for value in (NAN, float("inf"), 0.0, -1.0):
    row(f"mmd gamma {value}", nothing, mmd(kernel=[1.0, value]), ValueError, "kernel", str(value), "finite")
    row(f"mmd gamma tensor {value}", nothing, mmd(kernel=torch.tensor([1.0, value])), ValueError, "kernel", "finite")
row("mmd gammas 2-D", nothing, mmd(kernel=torch.ones(1, 2)), ValueError, "kernel", "(1, 2)", "[U]")
row("mmd gammas int", nothing, mmd(kernel=torch.ones(2).long()), ValueError, "kernel", "int64")
row("mmd estimator", nothing, mmd(estimator="linear"), ValueError, "estimator", "'linear'", "unbiased")
row("mmd reduction", nothing, mmd(reduction="sum"), ValueError, "reduction", "'sum'", "mean")
row("mmd impl", nothing, mmd(impl="cuda"), ValueError, "impl", "'cuda'")
one = torch.tensor([0, 0, 0, 1])
row("mmd one sample", nothing, mmd(domains=one, estimator="unbiased"), ValueError, "domains", "[1]", "unbiased")


def head_mmd(domains=ids, *, heads=None, run=True, **options):
    """Captures a forward pass over 4 images, then calls head_mmd."""

    def call(model, folder):
        with seeded(0), fastheads.capture_heads(model) as captured:
            embedding = features(model, batch=4) if run else None
        given = {k: v(model, embedding) if callable(v) else v for k, v in options.items()}
        fastheads.head_mmd(captured if heads is None else heads, domains, **given)

    return call


def frozen(model, embedding):
    return embedding.detach()


def unrelated(model, embedding):
    return embedding.detach().requires_grad_()


def no_grad(model, embedding):
    with torch.no_grad():
        return features(model, batch=4)


embedded = {"features": "embedding"}
row("head_mmd heads", adapted(), head_mmd(heads=text_batch), TypeError, "heads", "Tensor", "capture_heads")
row("head_mmd nothing", adapted(), head_mmd(run=False), RuntimeError, "heads", "nothing was captured")
row("head_mmd no gates", adapted(gate=None), head_mmd(), ValueError, "heads", "gate=None")
row("head_mmd features", adapted(), head_mmd(features="tokens"), ValueError, "features", "'tokens'", "embedding")
row("head_mmd reduction", adapted(), head_mmd(reduction="none"), ValueError, "reduction")
row("head_mmd domains", adapted(), head_mmd(ids[:3]), ValueError, "domains", "(3,)", "[4]")
row("head_mmd domains dtype", adapted(), head_mmd(ids.float()), TypeError, "domains", "float32")
row("head_mmd domain ids", adapted(), head_mmd(ids - 1), ValueError, "domains", "-1")
row("head_mmd kernel", adapted(), head_mmd(kernel=[NAN]), ValueError, "kernel", "nan")
row("head_mmd keyword", adapted(), head_mmd(bandwidth=1.0), TypeError, "bandwidth")
row("head_mmd no embedding", adapted(), head_mmd(**embedded), ValueError, "embedding", "encode_image")
row("head_mmd frozen", adapted(), head_mmd(embedding=frozen, **embedded), ValueError, "embedding", "gradient")
row("head_mmd no_grad", adapted(), head_mmd(embedding=no_grad, **embedded), ValueError, "embedding", "gradient")
row("head_mmd unrelated", adapted(), head_mmd(embedding=unrelated, **embedded), ValueError, "embedding", "gates")
row("head_mmd embedding no gates", adapted(gate=None), head_mmd(embedding=frozen, **embedded), ValueError, "gate=None")
row(
    *("head_mmd embedding list", adapted(), head_mmd(embedding=[1.0], **embedded), TypeError, "embedding", "list"),
)


def kl(features=text_batch, teacher=text_batch, weights=text_batch, scale=100.0):
    return lambda m, t: fastheads.context_kl(features, teacher, weights, scale)


row("context_kl features 1-D", nothing, kl(text_batch[0]), ValueError, "features", "(8,)", "[B, E]")
row("context_kl features 3-D", nothing, kl(text_batch[None]), ValueError, "features", "(1, 4, 8)")
row("context_kl teacher", nothing, kl(teacher=text_batch[:3]), ValueError, "teacher_features", "(3, 8)", "(4, 8)")
row("context_kl weights", nothing, kl(weights=text_batch.T), ValueError, "context_weights", "(8, 4)", "[C, 8]")
row("context_kl weights 1-D", nothing, kl(weights=text_batch[0]), ValueError, "context_weights", "(8,)")
for name, call, error, words in [
    ("features list", kl([1.0]), TypeError, ["features", "list"]),
    ("teacher None", kl(teacher=None), TypeError, ["teacher_features", "NoneType"]),
    ("weights list", kl(weights=[[1.0] * 8]), TypeError, ["context_weights", "list"]),
    ("features int", kl(text_batch.long()), TypeError, ["features", "int64"]),
    ("teacher int", kl(teacher=text_batch.long()), TypeError, ["teacher_features", "int64"]),
    ("weights int", kl(weights=text_batch.long()), TypeError, ["context_weights", "int64"]),
    ("teacher device", kl(teacher=meta(text_batch)), ValueError, ["teacher_features", "meta"]),
    ("weights device", kl(weights=meta(text_batch)), ValueError, ["context_weights", "meta"]),
    ("scale nan", kl(scale=NAN), ValueError, ["logit_scale", "nan"]),
    ("scale text", kl(scale="100"), TypeError, ["logit_scale", "'100'"]),
]:
    row(f"context_kl {name}", nothing, call, error, *words)

tokenizer = lambda prompts: torch.ones(len(prompts), 12, dtype=torch.int64)  # noqa: E731
for function in (fastheads.class_text_weights, fastheads.context_text_weights):
    name = function.__name__

    def text(*args, f=function):
        return lambda m, t: f(m, tokenizer, *args)

    row(f"{name} classnames text", clip, text("dog", ["a {}."]), ValueError, "classnames", "'dog'")
    row(f"{name} classnames empty", clip, text([], ["a {}."]), ValueError, "classnames", "[]")
    row(f"{name} templates text", clip, text(["dog"], "a {}."), ValueError, "templates", "'a {}.'")
    row(f"{name} templates empty", clip, text(["dog"], []), ValueError, "templates", "[]")
    row(f"{name} no place", clip, text(["dog"], ["a {}.", "a photo."]), ValueError, "templates", "'a photo.'", "{}")
    other = text(["dog"], ["a {style} photo."])
    row(f"{name} other place", clip, other, ValueError, "templates", "style")
    no_text = lambda: nn.Linear(2, 2)  # noqa: E731
    row(f"{name} model", no_text, text(["dog"], ["a {}."]), TypeError, "model", "Linear")


@pytest.mark.parametrize(("build", "call", "error", "words"), TABLE)
def test_bad_input_is_refused_in_words_and_changes_nothing(build, call, error, words, tmp_path):
    assert_refused(build, call, error, words, tmp_path)


def test_every_public_function_is_in_the_table():
    assert [name for name in losses.__all__ if name.islower() and name not in TABLE.functions()] == []
