// Kernel sums of many Gaussian kernels over one tile of inner products: what PyTorch cannot fuse. Plain C interface.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Which instructions the calls below use on this machine: "avx512", "avx2" or "portable".
const char *fastheads_isa(void);

// Uses these instructions from now on, in the whole process; NULL: the best there are again. For tests.
// Returns 0, or 1 where this machine does not have them (nothing changes then).
int fastheads_force_isa(const char *name);

// For each of `layers` tiles of inner products g = x yᵀ [rows, columns] (layer l at gram + l·layer_stride, row i at
// + i·row_stride), with d² = x2_i + y2_j − 2 g_ij, at least 0, and e_u = exp(−γ_u d²):
//
//     sums[l, i, s] = Σ_{j in segment s} Σ_u e_u          (float64)
//     g_ij          = coeff[domain_i, s] Σ_u γ_u e_u      (where coeff is given; else g is left as scratch)
//
// x2 [layers, rows], y2 [layers, columns]: squared norms, layers x2_stride and y2_stride apart.
// segments [S + 1]: where each domain's columns start, the last is `columns`. domains [rows]: of the rows.
// gammas [layers, kernels]; powers [kernels]: 0 for an exponential of its own, 2 or 10 where e_u is that power of e_(u-1).
// coeff [layers, S, S] or NULL. self [rows]: the column that is the same sample as the row, if any (else out of range):
// d² = 0 there, and its weight 0 (it pulls nowhere).
// threads: how many share the rows. The result does not depend on it.
//
// Returns 0, or 1 where an argument is out of range (nothing is written then).
int fastheads_mmd_tile_f32(float *gram, int64_t layer_stride, int64_t row_stride, int64_t layers, int64_t rows,
                           int64_t columns, const float *x2, int64_t x2_stride, const float *y2, int64_t y2_stride,
                           const int64_t *segments, const int64_t *domains, int64_t num_domains, const float *gammas,
                           const int32_t *powers, int64_t kernels, const float *coeff, const int64_t *self, double *sums,
                           int threads);
int fastheads_mmd_tile_f64(double *gram, int64_t layer_stride, int64_t row_stride, int64_t layers, int64_t rows,
                           int64_t columns, const double *x2, int64_t x2_stride, const double *y2, int64_t y2_stride,
                           const int64_t *segments, const int64_t *domains, int64_t num_domains, const double *gammas,
                           const int32_t *powers, int64_t kernels, const double *coeff, const int64_t *self, double *sums,
                           int threads);

#ifdef __cplusplus
}
#endif
