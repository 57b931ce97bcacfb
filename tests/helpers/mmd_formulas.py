"""The MMD by hand: bandwidths and estimators as explicit double loops, and the code it goes round as. Nothing here
shares code with the library. Not a test file.

Tolerances in float64 are 1e-10 relative: squared distances by a Gram matrix lose a few of the 16 digits against the
differences taken here, and gamma (up to 1000) multiplies that loss.
"""

import torch

EXACT = dict(rtol=1e-10, atol=1e-12)
DOMAINBED = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
EXPLICIT = [0.05, 0.4]
KERNELS = {"domainbed": "domainbed", "adaptive": "adaptive", "dan": "dan", "explicit": EXPLICIT}
OWN_ESTIMATOR = {
    "domainbed": "biased",
    "adaptive": "unbiased",
    "dan": "biased",
    "explicit": "biased",
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*sizes):
    """Domain ids, `sizes[s]` of domain s, shuffled: rows of a domain are not adjacent."""
    ids = torch.cat([torch.full((n,), s, dtype=torch.int64) for s, n in enumerate(sizes)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))]


def squared(x, y):
    """All squared distances by differences, in x's dtype: [n, D], [m, D] -> [n, m]."""
    return (x[:, None] - y[None]).square().sum(-1)


def gammas_loops(x, kernel):
    """Kernel factors for x [n, D] by a double loop over all pairs."""
    if kernel == "domainbed":
        return DOMAINBED
    if not isinstance(kernel, str):
        return [float(g) for g in kernel]
    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            total += float((x[i] - x[j]).square().sum())
    if kernel == "adaptive":
        mean = total / n**2  # over all pairs, the zero diagonal included
        return [1 / (2 * 2.0**a * mean) for a in (-3, -2, -1, 0, 1)]
    assert kernel == "dan", kernel
    bandwidth = total / (n**2 - n) / 4
    return [1 / (bandwidth * 2**i) for i in range(5)]


def pair_loops(x, y, gammas, estimator):
    """One pair's MMD, sample pair by sample pair."""

    def k(u, v):
        d2 = (u - v).square().sum()
        return sum((-g * d2).exp() for g in gammas)

    n, m, unbiased = len(x), len(y), estimator == "unbiased"
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if not (unbiased and i == j))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if not (unbiased and i == j))
    xy = sum(k(x[i], y[j]) for i in range(n) for j in range(m))
    nn, mm = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    return xx / nn + yy / mm - 2 * xy / (n * m)


def mmd_loops(x, domains, kernel, estimator):
    """Mean over pairs a < b of the domains that are present; x [n, D]."""
    gammas = gammas_loops(x, kernel)
    present = sorted(set(domains.tolist()))
    values = [
        pair_loops(x[domains == a], x[domains == b], gammas, estimator)
        for i, a in enumerate(present)
        for b in present[i + 1 :]
    ]
    return sum(values) / len(values)


def domainbed_mmd(features_per_domain):
    """DomainBed's MMD penalty: fixed gammas, means over whole blocks, mean over all pairs."""
    penalty, count = 0.0, len(features_per_domain)
    for i in range(count):
        for j in range(i + 1, count):
            x, y = features_per_domain[i], features_per_domain[j]

            def gaussian(a, b):
                d2 = squared(a, b)
                return sum(torch.exp(-g * d2) for g in DOMAINBED)

            penalty = penalty + gaussian(x, x).mean() + gaussian(y, y).mean() - 2 * gaussian(x, y).mean()
    return penalty / (count * (count - 1) / 2)


def tllib_mk_mmd(source, target):
    """TLlib's MultipleKernelMaximumMeanDiscrepancy, less its constant 2 / (n - 1)."""
    n = len(source)
    d2 = squared(torch.cat([source, target]), torch.cat([source, target]))
    kernel = sum(torch.exp(-d2 / (2 * 2.0**a * d2.detach().mean())) for a in range(-3, 2))
    index = torch.zeros(2 * n, 2 * n, dtype=source.dtype)
    for i in range(n):
        for j in range(n):
            index[i, n + j] = index[n + i, j] = -1 / (n * n)
            if i != j:
                index[i, j] = index[n + i, n + j] = 1 / (n * (n - 1))
    return (kernel * index).sum()


def dan_snippet(source, target, kernel_mul=2.0, kernel_num=5):
    """The snippet that goes round as DAN's MMD: four blocks of one kernel matrix, equal sizes."""
    total = torch.cat([source, target])
    n, size = len(source), len(total)
    d2 = squared(total, total)
    bandwidth = d2.detach().sum() / (size**2 - size)
    bandwidth = bandwidth / kernel_mul ** (kernel_num // 2)
    kernels = sum(torch.exp(-d2 / (bandwidth * kernel_mul**i)) for i in range(kernel_num))
    return (kernels[:n, :n] + kernels[n:, n:] - kernels[:n, n:] - kernels[n:, :n]).mean()
