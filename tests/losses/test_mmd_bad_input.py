"""Bad input of the MMD."""

import math

import pytest
import torch

from fastheads.losses import mmd

X, DOM = torch.zeros(8, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
EITHER = (ValueError, TypeError)
BAD = {
    "features_1d": (dict(features=torch.zeros(8)), ValueError, "features"),
    "features_4d": (dict(features=torch.zeros(1, 1, 8, 4)), ValueError, "features"),
    "features_list": (dict(features=[[0.0] * 4] * 8), EITHER, "features"),
    "features_int": (dict(features=X.long()), EITHER, "features"),
    "features_uint8": (dict(features=X.to(torch.uint8)), EITHER, "features"),
    "features_bool": (dict(features=X.bool()), EITHER, "features"),
    "features_complex": (dict(features=X.to(torch.complex64)), EITHER, "features"),
    "domains_short": (dict(domains=DOM[:7]), ValueError, "domains"),
    "domains_long": (dict(domains=torch.cat([DOM, DOM])), ValueError, "domains"),
    "domains_2d": (dict(domains=DOM[None]), ValueError, "domains"),
    "domains_scalar": (dict(domains=torch.tensor(0)), ValueError, "domains"),
    "domains_float": (dict(domains=DOM.float()), EITHER, "domains"),
    "domains_bool": (dict(domains=DOM.bool()), EITHER, "domains"),
    "domains_none": (dict(domains=None), EITHER, "domains"),
    "domains_negative": (dict(domains=DOM - 1), ValueError, "domains"),
    "domains_negative_given_number": (
        dict(domains=DOM - 1, num_domains=3),
        ValueError,
        "domains",
    ),
    "domains_too_large": (dict(num_domains=2), ValueError, "domains"),
    "num_domains_zero": (dict(num_domains=0), ValueError, "num_domains"),
    "num_domains_negative": (dict(num_domains=-3), ValueError, "num_domains"),
    "num_domains_float": (dict(num_domains=3.5), EITHER, "num_domains"),
    "num_domains_text": (dict(num_domains="3"), EITHER, "num_domains"),
    "kernel_unknown": (dict(kernel="rbf"), ValueError, "kernel"),
    "kernel_none": (dict(kernel=None), EITHER, "kernel"),
    "kernel_empty": (dict(kernel=[]), EITHER, "kernel"),
    "kernel_text_items": (dict(kernel=["a"]), EITHER, "kernel"),
    "kernel_nan": (dict(kernel=[0.1, math.nan]), ValueError, "kernel"),
    "kernel_inf": (dict(kernel=[math.inf]), ValueError, "kernel"),
    "kernel_inf_tensor": (dict(kernel=torch.tensor([math.inf])), ValueError, "kernel"),
    "kernel_negative": (dict(kernel=[-1.0]), ValueError, "kernel"),
    "kernel_3d": (dict(kernel=torch.ones(1, 1, 2)), ValueError, "kernel"),
    "estimator_unknown": (dict(estimator="linear"), ValueError, "estimator"),
    "reduction_unknown": (dict(reduction="sum"), ValueError, "reduction"),
    "impl_unknown": (dict(impl="triton3000"), ValueError, "impl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    changes, error, word = BAD[case]
    with pytest.raises(error, match=word):
        mmd(**{**dict(features=X, domains=DOM), **changes})


def test_the_good_version_of_the_bad_input_table_passes():
    assert mmd(X, DOM).item() == pytest.approx(0, abs=1e-6)
    assert mmd(X, DOM.int()).item() == pytest.approx(0, abs=1e-6)  # any integer dtype names a domain
