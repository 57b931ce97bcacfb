"""Tables of bad input: what a public function says to it, before it changes anything. Not a test file.

A row is: id, how the model is built, the call, the exception, words its message must hold (the argument's name first).
"""

import pytest
from standins import assert_unchanged, clip, patched, snapshot

from fastheads import HeadConfig

NAN = float("nan")


class Table(list):
    def row(self, id, build, call, error, *words):
        assert id not in [row.id for row in self], id
        self.append(pytest.param(build, call, error, words, id=id))

    def functions(self):
        """What has a row: the first word of its id is the function's name."""
        return {row.id.split()[0] for row in self}


def adapted(**options):
    """A builder of a patched model, image tower only unless asked otherwise."""
    return lambda: patched("clip", HeadConfig(**options))


def with_(change, build=clip):
    """A builder of a model with something changed in it."""

    def make():
        model = build()
        changed = change(model)
        return model if changed is None else changed

    return make


def nothing():
    return None


def assert_refused(build, call, error, words, folder):
    """In words, with nothing changed and nothing saved."""
    model = build()
    inner = getattr(model, "module", model)
    before = snapshot(model), snapshot(inner)
    with pytest.raises(error) as caught:
        call(model, folder)
    assert_unchanged(model, before[0])
    assert_unchanged(inner, before[1])
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (folder / "a").exists()
