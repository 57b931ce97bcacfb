// Runs the C interface on many shapes, every buffer of exactly its size, so that the sanitizers see any step outside.
// `make sanitize` and tests/csrc/test_native.py build it together with csrc/mmd.cpp.
#include "mmd.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

namespace {

int tile(float *g, int64_t ls, int64_t rs, int64_t L, int64_t R, int64_t C, const float *x2, const float *y2,
         const int64_t *seg, const int64_t *dom, int64_t S, const float *gammas, const int32_t *powers, int64_t U,
         const float *coeff, const int64_t *self, double *sums, int threads) {
    return fastheads_mmd_tile_f32(g, ls, rs, L, R, C, x2, R, y2, C, seg, dom, S, gammas, powers, U, coeff, self, sums, threads);
}
int tile(double *g, int64_t ls, int64_t rs, int64_t L, int64_t R, int64_t C, const double *x2, const double *y2,
         const int64_t *seg, const int64_t *dom, int64_t S, const double *gammas, const int32_t *powers, int64_t U,
         const double *coeff, const int64_t *self, double *sums, int threads) {
    return fastheads_mmd_tile_f64(g, ls, rs, L, R, C, x2, R, y2, C, seg, dom, S, gammas, powers, U, coeff, self, sums, threads);
}

template <class T> std::unique_ptr<T[]> exactly(int64_t n) { return std::make_unique<T[]>(static_cast<size_t>(n)); }

template <class T> int64_t one(int64_t L, int64_t R, int64_t C, int64_t S, bool with_coeff, int threads, T spread) {
    std::mt19937 random(static_cast<unsigned>(L * 1000 + R * 100 + C + S));
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<int64_t> domain(0, S - 1), column(-2, C + 1);
    const int64_t U = 7, gap = 3; // rows of gram stand gap apart; the last one ends with the buffer
    const int64_t size = L * R == 0 ? 0 : (L * R - 1) * (C + gap) + C;
    const auto gram = exactly<T>(size), x2 = exactly<T>(L * R), y2 = exactly<T>(L * C), gammas = exactly<T>(L * U);
    const auto coeff = exactly<T>(L * S * S);
    const auto segments = exactly<int64_t>(S + 1), domains = exactly<int64_t>(R), self = exactly<int64_t>(R);
    const auto powers = exactly<int32_t>(U);
    const auto sums = exactly<double>(L * R * S);
    for (int64_t i = 0; i < size; ++i) gram[i] = spread * static_cast<T>(normal(random));
    for (int64_t i = 0; i < L * R; ++i) x2[i] = spread * std::abs(static_cast<T>(normal(random)));
    for (int64_t i = 0; i < L * C; ++i) y2[i] = spread * std::abs(static_cast<T>(normal(random)));
    for (int64_t i = 0; i < L * S * S; ++i) coeff[i] = static_cast<T>(normal(random));
    for (int64_t i = 0; i < R; ++i) domains[i] = domain(random), self[i] = column(random);
    for (int64_t s = 0; s < S; ++s) segments[s] = s * C / S; // with S > C: empty ones as well
    segments[S] = C;
    for (int64_t u = 0; u < U; ++u) {
        powers[u] = u % 2 ? 10 : u == 4 ? 2 : 0;
        if (u == 0) powers[u] = 0;
        for (int64_t l = 0; l < L; ++l) gammas[l * U + u] = static_cast<T>(std::pow(10.0, static_cast<double>(u - 3)));
    }
    for (int64_t i = 0; i < L * R * S; ++i) sums[i] = std::nan("");
    const int failed = tile(gram.get(), R * (C + gap), C + gap, L, R, C, x2.get(), y2.get(), segments.get(), domains.get(),
                            S, gammas.get(), powers.get(), U, with_coeff ? coeff.get() : nullptr, self.get(), sums.get(), threads);
    int64_t wrong = failed;
    for (int64_t i = 0; i < L * R * S; ++i) wrong += !(sums[i] >= 0);
    return wrong;
}

template <class T> int64_t all() {
    int64_t wrong = 0;
    for (const int64_t L : {0, 1, 2})
        for (const int64_t R : {0, 1, 3, 17})
            for (const int64_t C : {0, 1, 7, 8, 255, 256, 257, 700})
                for (const int64_t S : {1, 3, 9})
                    for (const int threads : {-1, 0, 1, 3})
                        for (const bool with_coeff : {false, true})
                            for (const T spread : {T(1), T(1e6)}) wrong += one<T>(L, R, C, S, with_coeff, threads, spread);
    return wrong;
}

} // namespace

int main() {
    int64_t wrong = 0;
    for (const char *isa : {"portable", "avx2", "avx512"}) {
        if (fastheads_force_isa(isa) != 0) {
            std::printf("%s: not on this machine\n", isa);
            continue;
        }
        const int64_t found = all<float>() + all<double>();
        std::printf("%s: %s\n", fastheads_isa(), found ? "WRONG" : "clean");
        wrong += found;
    }
    wrong += fastheads_force_isa("mmx") != 1;
    wrong += fastheads_force_isa(nullptr);
    return wrong != 0;
}
