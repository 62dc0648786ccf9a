// add_norm: residual + LayerScale * branch and the norm of the rounded sum, alone or on the way from plane to plane.
// See ops/add_norm.py and ops/plane_switch.py; its backward is in add_norm_backward.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "globals.h"
#include "norm.h"

namespace pcf {
namespace {

// Rounds a row to T, stores it as that unless `out` is null, and returns the sum of its channels.
template <class A, class T>
A round_row(A* row, void* out, int64_t channels) {
  auto po = static_cast<T*>(out);
  auto sum = Lanes<A>::all(0);
  pieces<A>(channels, [&](int64_t i, auto n) {
    auto v = Lanes<A>::load(row + i, n);
    if (po) v.store(po + i, n);
    v = v.template rounded<T>();
    v.store(row + i, n);
    sum = sum + v;
  });
  return sum.sum();
}

// The same of x + scale * branch, each T, in one pass. No branch: x; no scale: 1.
template <class A, class T>
A add_and_round(A* row, const void* x, const void* branch, const A* scale, void* out, int64_t channels) {
  auto px = static_cast<const T*>(x), pb = static_cast<const T*>(branch);
  auto po = static_cast<T*>(out);
  auto sum = Lanes<A>::all(0);
  pieces<A>(channels, [&](int64_t i, auto n) {
    auto v = Lanes<A>::load(px + i, n);
    if (pb && scale) v = Lanes<A>::fma(Lanes<A>::load(pb + i, n), Lanes<A>::load(scale + i, n), v);
    if (pb && !scale) v = v + Lanes<A>::load(pb + i, n);
    if (po) v.store(po + i, n);
    v = v.template rounded<T>();
    v.store(row + i, n);
    sum = sum + v;
  });
  return sum.sum();
}

// What is done to a row, from old tensors to new ones.
template <class A>
class Boundary {
 public:
  Boundary(const Tensor& x, const OptionalTensor& branch, const OptionalTensor& scale, const OptionalTensor& weight,
           const OptionalTensor& bias, const Tensor& out, const Tensor& normed, const Tensor& mean, const Tensor& rstd,
           at::ScalarType summed, std::string_view norm, double eps)
      : channels(x.size(2)), x_(x), branch_(branch), scale_(vector_of<A>(scale, x.size(2))), weight_(vector_of<A>(weight, x.size(2))),
        bias_(vector_of<A>(bias, x.size(2))), out_(out), normed_(normed), norm_(norm_named(norm)), eps_(eps),
        mean_(mean.numel() ? mean.mutable_data_ptr<A>() : nullptr), rstd_(rstd.numel() ? rstd.mutable_data_ptr<A>() : nullptr) {
    auto alike = x.scalar_type() == summed && (!branch || branch->scalar_type() == summed);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, summed, "add_norm", [&] {
      round_ = round_row<A, scalar_t>;
      if (alike) add_and_round_ = add_and_round<A, scalar_t>;
    });
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, normed.scalar_type(), "add_norm",
                                    [&] { normalize_ = normalize<A, scalar_t>; });
  }
  const int64_t channels;

  // The sum, not rounded yet.
  void add(A* row, int64_t from) const {
    x_.read(row, from);
    if (branch_) branch_.add(row, from, data_or_null(scale_));
  }
  void ask_for(int64_t from) const { x_.ask_for(from), branch_.ask_for(from); }
  // An old row becomes a new one.
  void move(A* row, int64_t from, int64_t to) const {
    if (add_and_round_) {
      auto sum = add_and_round_(row, x_.at(from), branch_.at(from), data_or_null(scale_), out_.at(to), channels);
      normalize_row(row, sum, to);
    } else {
      add(row, from);
      finish(row, to);
    }
  }
  // A sum, not rounded yet, becomes a new row.
  void finish(A* row, int64_t to) const { normalize_row(row, round_(row, out_.at(to), channels), to); }

 private:
  Input<A> x_, branch_;                   // (..., C)
  std::vector<A> scale_, weight_, bias_;  // (C), or empty
  Output<A> out_, normed_;                // (..., C), or nothing
  Norm norm_;
  double eps_;
  A *mean_, *rstd_;  // one per new row, or null
  A (*round_)(A*, void*, int64_t);
  A (*add_and_round_)(A*, const void*, const void*, const A*, void*, int64_t) = nullptr;
  void (*normalize_)(void*, const A*, Statistics<A>, const A*, const A*, int64_t);

  void normalize_row(const A* row, A sum, int64_t to) const {
    if (norm_ == Norm::none) return;
    auto found = statistics(row, sum, channels, norm_, eps_);
    normalize_(normed_.at(to), row, found, data_or_null(weight_), data_or_null(bias_), channels);
    if (mean_) mean_[to] = found.mean;
    if (rstd_) rstd_[to] = found.rstd;
  }
};

template <class A>
void run(const RowMap& map, const Boundary<A>& boundary, int64_t via, bool mean) {
  auto grain = std::max<int64_t>(1, GRAIN / (4 * map.n[2] * boundary.channels));
  at::parallel_for(0, map.lines(), grain, [&](int64_t begin, int64_t end) {
    std::vector<A> row(boundary.channels);
    for (auto line = begin; line < end; ++line) {
      auto from = map.old_row(line), to = map.new_row(line);
      for (int64_t i = 0; i < map.n[2]; ++i) {
        if (i + AHEAD < map.n[2]) boundary.ask_for(from + (i + AHEAD) * map.step[2]);
        boundary.move(row.data(), from + i * map.step[2], to + i);
      }
    }
  });
  if (!map.num_globals) return;
  auto m = bands(map.num_in, map.num_out, via, mean);
  pool_globals<A>(
      map, m, mean, boundary.channels,
      [&](A* row, int64_t b, int64_t slice, int64_t token) { boundary.add(row, map.old_global(b, slice, token)); },
      [&](A* row, int64_t b, int64_t o, int64_t token) {
        for (auto slice = o; slice < (mean ? map.num_out : o + 1); ++slice) boundary.finish(row, map.new_global(b, slice, token));
      });
}

void check(const Tensor& x, const OptionalTensor& branch) {
  TORCH_CHECK_VALUE(x.is_contiguous() && x.dim() == 3, "x must be contiguous (B*P, g + L, C), got strides ", x.strides());
  TORCH_CHECK_VALUE(!branch || (branch->is_contiguous() && branch->sizes() == x.sizes()),
                    "branch must be contiguous and of x's shape ", x.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(
    const Tensor& x,               // (B*P1, g + L1, C), plane order of `old`, contiguous
    const OptionalTensor& branch,  // like x
    const OptionalTensor& scale,   // (C,)
    const OptionalTensor& weight,  // (C,)
    const OptionalTensor& bias,    // (C,)
    std::string_view old, std::string_view next, at::IntArrayRef sizes, int64_t num_globals, int64_t via, bool mean,
    std::string_view norm, double eps, std::optional<at::ScalarType> dtype) {
  // -> the sum (B*P2, g + L2, C), its norm, mean and 1 / deviation (B*P2, g + L2); nothing where not computed
  check(x, branch);
  RowMap map(x.size(0), x.size(1), Plane::named(old), Plane::named(next), sizes, num_globals);
  TORCH_CHECK_VALUE(via > 0, "via must be at least 1, got ", via);
  auto kept = branch || old != next || num_globals;  // else the sum is x
  auto summed = promoted(x, {branch, scale});
  auto statistic = summed == at::kDouble ? at::kDouble : at::kFloat;
  auto sequences = map.batch * map.num_out;
  auto make = [&](bool wanted, bool rows, at::ScalarType type) {
    auto shape = wanted ? std::vector<int64_t>{sequences, map.out_seq} : std::vector<int64_t>{0};
    if (wanted && rows) shape.push_back(x.size(2));
    return at::empty(shape, x.options().dtype(type));
  };
  auto out = make(kept, true, summed), normed = make(norm != "none", true, dtype.value_or(summed));
  auto average = make(norm == "layer", false, statistic), inverse = make(norm != "none", false, statistic);
  if (!x.numel()) return {out, normed, average, inverse};
  with_accumulator({summed}, [&](auto zero) {
    Boundary<decltype(zero)> boundary(x, branch, scale, weight, bias, out, normed, average, inverse, summed, norm, eps);
    run(map, boundary, via, mean);
  });
  return {out, normed, average, inverse};
}

void add_norm_(
    Tensor& x,                     // (N, rows, C), contiguous; the sum is written into it
    const Tensor& branch,          // like x
    const OptionalTensor& scale,   // (C,)
    const OptionalTensor& weight,  // (C,)
    const OptionalTensor& bias,    // (C,)
    std::string_view norm, double eps,
    Tensor& normed) {  // like x, of any dtype; the norm of the sum is written into it
  check(x, branch);
  auto summed = promoted(x, {branch, scale});
  TORCH_CHECK_VALUE(summed == x.scalar_type(), "x must have the dtype of the sum to be written to, ", summed, ", got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(normed.is_contiguous() && normed.sizes() == x.sizes(), "normed must be contiguous and of x's shape ",
                    x.sizes(), ", got ", normed.sizes());
  auto nothing = at::empty(0, x.options());
  if (x.numel()) {
    std::array<int64_t, 3> sizes{x.size(0), 1, x.size(1)};
    RowMap map(x.size(0), x.size(1), Plane::named("HW"), Plane::named("HW"), sizes, 0);
    with_accumulator({summed}, [&](auto zero) {
      Boundary<decltype(zero)> boundary(x, branch, scale, weight, bias, x, normed, nothing, nothing, summed, norm, eps);
      run(map, boundary, 1, false);
    });
  }
  for (auto* written : {&x, &normed})
    if (!written->is_inference()) written->unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CPU, m) {
  m.impl("add_norm", add_norm);
  m.impl("add_norm_", add_norm_);
}

}  // namespace pcf
