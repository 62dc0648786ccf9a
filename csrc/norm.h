// Statistics and norm of a row that is in float or double.
#pragma once

#include <cmath>

#include "rows.h"

namespace pcf {

enum class Norm { none, layer, rms };

inline Norm norm_named(std::string_view name) {
  if (name == "layer") return Norm::layer;
  if (name == "rms") return Norm::rms;
  TORCH_CHECK_VALUE(name == "none", "norm must be none, layer or rms, got ", std::string(name));
  return Norm::none;
}

template <class A>
struct Statistics {
  A mean, rstd;  // mean is 0 for an RMSNorm
};

template <class A>
A sum_of(const A* row, int64_t channels) {
  auto sum = Lanes<A>::all(0);
  pieces<A>(channels, [&](int64_t i, auto n) { sum = sum + Lanes<A>::load(row + i, n); });
  return sum.sum();
}

// Of a row whose sum is known.
template <class A>
Statistics<A> statistics(const A* row, A sum, int64_t channels, Norm norm, double eps) {
  auto mean = norm == Norm::layer ? sum / channels : A(0);
  auto squares = Lanes<A>::all(0), center = Lanes<A>::all(mean);
  pieces<A>(channels, [&](int64_t i, auto n) {
    auto d = (Lanes<A>::load(row + i, n) - center).first(n);
    squares = Lanes<A>::fma(d, d, squares);
  });
  return {mean, static_cast<A>(1 / std::sqrt(double(squares.sum()) / channels + eps))};
}

// to = (row - mean) * rstd * weight + bias; to may be row
template <class A, class T>
void normalize(void* to, const A* row, Statistics<A> s, const A* weight, const A* bias, int64_t channels) {
  auto p = static_cast<T*>(to);
  auto center = Lanes<A>::all(s.mean), rstd = Lanes<A>::all(s.rstd), shift = Lanes<A>::all(-s.mean * s.rstd);
  pieces<A>(channels, [&](int64_t i, auto n) {
    auto v = Lanes<A>::load(row + i, n);
    if constexpr (c10::is_reduced_floating_point_v<T>) {
      v = Lanes<A>::fma(v, rstd, shift);  // one rounding to T hides that it cancels
    } else {
      v = (v - center) * rstd;
    }
    if (weight && bias) v = Lanes<A>::fma(v, Lanes<A>::load(weight + i, n), Lanes<A>::load(bias + i, n));
    if (weight && !bias) v = v * Lanes<A>::load(weight + i, n);
    if (!weight && bias) v = v + Lanes<A>::load(bias + i, n);
    v.store(p + i, n);
  });
}

}  // namespace pcf
