#include "mmd.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTHEADS_X86 1
#else
#define FASTHEADS_X86 0
#endif
#define FASTHEADS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kChunk = 256; // columns at a time: their distances, exponentials and sums stay in the first cache
constexpr int64_t kVector = 16; // the most floats that one instruction takes

// exp(x) for x <= 0, without a branch, so that a loop of it becomes vector code: 2^n times a polynomial on ± ln(2) / 2.
// Under exp(-80), and in float64 exp(-700), it is 0: that adds nothing to a sum of kernels, and subnormal numbers, which
// times gamma and the pair's weight it would soon be, cost some chips a hundred times a product.
FASTHEADS_INLINE float exp_of(float x) {
    const bool vanishes = x < -80.0f;
    x = vanishes ? -80.0f : x;
    const float shifted = x * 1.44269504088896341f + 12582912.0f; // 1.5 · 2^23: rounds to a whole number in the low bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return vanishes ? 0.0f : p * power;
}

FASTHEADS_INLINE double exp_of(double x) {
    const bool vanishes = x < -700.0;
    x = vanishes ? -700.0 : x;
    const double shifted = x * 1.4426950408889634074 + 6755399441055744.0; // 1.5 · 2^52
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    double p = 1.0 / 6227020800.0; // the Taylor series to r^13: its next term is under 1e-17 at ln(2) / 2
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = static_cast<int64_t>((static_cast<uint64_t>(bits) + 1023u) << 52);
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return vanishes ? 0.0 : p * power;
}

template <class T> struct Row {
    T *g;                  // [columns]
    T x2;                  // the row's squared norm
    const T *y2;           // [columns]
    const int64_t *segments;
    int64_t num_domains;
    const T *gammas;
    const int32_t *powers;
    int64_t kernels;
    const T *coeff; // [num_domains] of the row's domain, or null
    int64_t self;   // the column that is this row, or out of range
    double *sums;   // [num_domains]
};

// One row: sums per segment, and its weights in place of its inner products. The kernels don't ask which domain a column
// is of, so that small domains fill vectors as well; the last chunk is filled up to whole vectors, with distances of 0.
template <class T> FASTHEADS_INLINE void run_row(const Row<T> &row) {
    alignas(64) T d2[kChunk], e[kChunk], k[kChunk], w[kChunk];
    const int64_t columns = row.segments[row.num_domains];
    for (int64_t s = 0; s < row.num_domains; ++s) row.sums[s] = 0.0;
    int64_t domain = 0; // of the column reached
    for (int64_t start = 0; start < columns; start += kChunk) {
        const int64_t left = columns - start;
        const int64_t n = left < kChunk ? left : kChunk;
        const int64_t filled = (n + kVector - 1) / kVector * kVector;
        T *g = row.g + start;
        const T *y2 = row.y2 + start;
        const T x2 = row.x2;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            const T d = x2 + y2[j] - T(2) * g[j];
            d2[j] = d < T(0) ? T(0) : d; // this way round a NaN stays one
        }
        for (int64_t j = n; j < filled; ++j) d2[j] = T(0);
        const int64_t self = row.self - start;
        const bool here = self >= 0 && self < n;
        if (here) d2[self] = T(0);
        for (int64_t u = 0; u < row.kernels; ++u) {
            const T gamma = row.gammas[u];
            if (row.powers[u] == 2) {
#pragma omp simd
                for (int64_t j = 0; j < filled; ++j) e[j] *= e[j];
            } else if (row.powers[u] == 10) {
#pragma omp simd
                for (int64_t j = 0; j < filled; ++j) {
                    const T e2 = e[j] * e[j], e4 = e2 * e2;
                    e[j] = e4 * e4 * e2;
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < filled; ++j) e[j] = exp_of(-gamma * d2[j]);
            }
            if (u == 0) {
#pragma omp simd
                for (int64_t j = 0; j < filled; ++j) {
                    k[j] = e[j];
                    w[j] = gamma * e[j];
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < filled; ++j) {
                    k[j] += e[j];
                    w[j] += gamma * e[j];
                }
            }
        }
        for (int64_t from = 0; from < n; ++domain) {
            const int64_t end = row.segments[domain + 1] - start;
            const int64_t to = end < n ? end : n;
            T part = T(0);
#pragma omp simd reduction(+ : part)
            for (int64_t j = from; j < to; ++j) part += k[j];
            row.sums[domain] += static_cast<double>(part);
            if (row.coeff) {
                const T factor = row.coeff[domain];
#pragma omp simd
                for (int64_t j = from; j < to; ++j) g[j] = factor * w[j];
            }
            from = to;
            if (end > n) break; // the domain goes on in the next chunk
        }
        if (row.coeff && here) g[self] = T(0);
    }
}

template <class T> void row_portable(const Row<T> &row) { run_row(row); }
#if FASTHEADS_X86
template <class T> __attribute__((target("avx2,fma"))) void row_avx2(const Row<T> &row) { run_row(row); }
template <class T> __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))) void row_avx512(const Row<T> &row) {
    run_row(row);
}
#endif

enum class Isa { portable, avx2, avx512 };

Isa best_isa() {
#if FASTHEADS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return Isa::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::portable;
#else
    return Isa::portable;
#endif
}

std::atomic<Isa> &chosen() {
    static std::atomic<Isa> found{best_isa()};
    return found;
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char *name_of(Isa which) {
    switch (which) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
    }
}

template <class T> using RowFunction = void (*)(const Row<T> &);

template <class T> RowFunction<T> row_function() {
    switch (isa()) {
#if FASTHEADS_X86
    case Isa::avx512: return row_avx512<T>;
    case Isa::avx2: return row_avx2<T>;
#endif
    default: return row_portable<T>;
    }
}

template <class T>
int run_tile(T *gram, int64_t layer_stride, int64_t row_stride, int64_t layers, int64_t rows, int64_t columns, const T *x2,
             int64_t x2_stride, const T *y2, int64_t y2_stride, const int64_t *segments, const int64_t *domains,
             int64_t num_domains, const T *gammas, const int32_t *powers, int64_t kernels, const T *coeff,
             const int64_t *self, double *sums, int threads) {
    if (layers < 0 || rows < 0 || columns < 0 || num_domains < 1 || kernels < 1)
        return 1;
    if (powers[0] != 0) return 1;
    for (int64_t u = 0; u < kernels; ++u)
        if (powers[u] != 0 && powers[u] != 2 && powers[u] != 10) return 1;
    if (segments[0] != 0 || segments[num_domains] != columns) return 1;
    for (int64_t s = 0; s < num_domains; ++s)
        if (segments[s] > segments[s + 1]) return 1;
    for (int64_t i = 0; i < rows; ++i)
        if (domains[i] < 0 || domains[i] >= num_domains) return 1;
    const RowFunction<T> run = row_function<T>();
    const int64_t all = layers * rows;
    const bool alone = threads <= 1 || all < 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (!alone)
    for (int64_t at = 0; at < all; ++at) {
        const int64_t l = at / rows, i = at % rows;
        const T *own = coeff ? coeff + (l * num_domains + domains[i]) * num_domains : nullptr;
        run(Row<T>{gram + l * layer_stride + i * row_stride, x2[l * x2_stride + i], y2 + l * y2_stride, segments,
                   num_domains, gammas + l * kernels, powers, kernels, own, self[i],
                   sums + (l * rows + i) * num_domains});
    }
    return 0;
}

} // namespace

extern "C" {

const char *fastheads_isa(void) { return name_of(isa()); }

int fastheads_force_isa(const char *name) {
    const Isa best = best_isa();
    if (name == nullptr) {
        chosen().store(best);
        return 0;
    }
    for (const Isa which : {Isa::portable, Isa::avx2, Isa::avx512})
        if (which <= best && std::strcmp(name, name_of(which)) == 0) {
            chosen().store(which);
            return 0;
        }
    return 1;
}

#define FASTHEADS_TILE(NAME, T)                                                                                        \
    int NAME(T *gram, int64_t layer_stride, int64_t row_stride, int64_t layers, int64_t rows, int64_t columns,         \
             const T *x2, int64_t x2_stride, const T *y2, int64_t y2_stride, const int64_t *segments,                  \
             const int64_t *domains, int64_t num_domains, const T *gammas, const int32_t *powers, int64_t kernels,     \
             const T *coeff, const int64_t *self, double *sums, int threads) {                                            \
        return run_tile(gram, layer_stride, row_stride, layers, rows, columns, x2, x2_stride, y2, y2_stride, segments, \
                        domains, num_domains, gammas, powers, kernels, coeff, self, sums, threads);                \
    }
FASTHEADS_TILE(fastheads_mmd_tile_f32, float)
FASTHEADS_TILE(fastheads_mmd_tile_f64, double)
}
