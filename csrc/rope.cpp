// rope: rotary position embedding of heads in the rotate-half layout, in place or not. See ops/rope.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace pcf {
namespace {

// Sine and cosine of a token, put together from the tables of its axes.
template <class A>
class Angles {
 public:
  Angles(at::TensorList sin, at::TensorList cos, int64_t half, bool back) : half_(half), back_(back) {
    for (size_t i = 0; i < sin.size(); ++i) {
      sizes_.push_back(sin[i].size(0));
      widths_.push_back(sin[i].size(1));
      kept_.push_back(sin[i].contiguous());
      kept_.push_back(cos[i].contiguous());
      sin_.emplace_back(kept_[2 * i]);
      cos_.emplace_back(kept_[2 * i + 1]);
    }
  }
  // Into sin (half) and cos (half).
  void read(A* sin, A* cos, int64_t token) const {
    int64_t at = half_;
    for (auto axis = static_cast<int64_t>(sizes_.size()) - 1; axis >= 0; --axis) {
      auto i = token % sizes_[axis];
      token /= sizes_[axis], at -= widths_[axis];
      sin_[axis].read(sin + at, i);
      cos_[axis].read(cos + at, i);
    }
    if (back_) std::transform(sin, sin + half_, sin, [](A v) { return -v; });
  }

 private:
  int64_t half_;
  bool back_;
  std::vector<int64_t> sizes_, widths_;
  std::vector<Tensor> kept_;
  std::vector<Input<A>> sin_, cos_;
};

// Rounded to a dtype of no more than A's bits.
template <class A>
Lanes<A> rounded(const Lanes<A>& v, at::ScalarType type) {
  A some[Lanes<A>::size];
  v.store(some);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "rope", [&] {
    for (auto& value : some) value = static_cast<A>(static_cast<scalar_t>(value));
  });
  return Lanes<A>::load(some);
}

struct Heads {
  int64_t sequences, rows, heads, half, num_globals, turned;
  bool narrow;             // computed in a dtype that cannot hold all of x's values: globals are rounded to it as well
  at::ScalarType compute;  // that dtype
};

// Turns a head: first and second half of its channels.
template <class A, bool NARROW, class T>
PCF_INLINE void turn(T* to, const T* from, const A* sin, const A* cos, const Heads& h) {
  pieces<A>(h.half, [&](int64_t i, auto n) {
    auto a = Lanes<A>::load(from + i, n), b = Lanes<A>::load(from + h.half + i, n);
    auto s = Lanes<A>::load(sin + i, n), c = Lanes<A>::load(cos + i, n);
    if (NARROW) a = rounded(a, h.compute), b = rounded(b, h.compute);
    auto first = a * c - b * s, second = Lanes<A>::fma(a, s, b * c);
    if (NARROW) first = rounded(first, h.compute), second = rounded(second, h.compute);
    first.store(to + i, n);
    second.store(to + h.half + i, n);
  });
}

template <class A, class T>
void copy(T* to, const T* from, bool round, const Heads& h) {
  if (!round) {
    if (to != from) std::copy_n(from, 2 * h.half, to);
    return;
  }
  pieces<A>(2 * h.half, [&](int64_t i, auto n) { rounded(Lanes<A>::load(from + i, n), h.compute).store(to + i, n); });
}

template <class A, class T>
void run(const Tensor& x, const Tensor& out, const Angles<A>& angles, const Heads& h) {
  auto from = x.const_data_ptr<T>();
  auto to = out.mutable_data_ptr<T>();
  auto grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, 2 * h.half * h.heads));
  at::parallel_for(0, h.sequences * h.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> sin(h.half), cos(h.half);
    for (auto job = begin; job < end; ++job) {
      auto sequence = job / h.rows, row = job % h.rows;
      auto is_global = row < h.num_globals;
      if (!is_global) angles.read(sin.data(), cos.data(), row - h.num_globals);
      auto source = from + sequence * x.stride(0) + row * x.stride(1);
      if (row + AHEAD < h.rows) {
        for (int64_t head = 0; head < h.turned; ++head)
          prefetch(source + AHEAD * x.stride(1) + head * x.stride(2), 2 * h.half * sizeof(T));
      }
      auto target = to + sequence * out.stride(0) + row * out.stride(1);
      auto heads = to == from && !h.narrow ? h.turned : h.heads;  // in place the others are there already
      for (int64_t head = 0; head < heads; ++head, source += x.stride(2), target += out.stride(2)) {
        if (head < h.turned && !is_global && !h.narrow) {
          turn<A, false>(target, source, sin.data(), cos.data(), h);
        } else if (head < h.turned && !is_global) {
          turn<A, true>(target, source, sin.data(), cos.data(), h);
        } else {
          copy<A>(target, source, h.narrow && head < h.turned, h);
        }
      }
    }
  });
}

void turn_into(const Tensor& x, const Tensor& out, bool back, int64_t num_globals, int64_t turned, bool in_table_dtype,
               at::TensorList sin, at::TensorList cos) {
  TORCH_CHECK_VALUE(!sin.empty() && sin.size() == cos.size(), "sin and cos must be tables; make them of periods first");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (N, g + L, heads, hd), got ", x.sizes());
  int64_t length = 1, half = 0;
  for (size_t i = 0; i < sin.size(); ++i) {
    TORCH_CHECK_VALUE(sin[i].dim() == 2 && sin[i].sizes() == cos[i].sizes(), "sin and cos must be (n, s) alike, got ", sin[i].sizes());
    length *= sin[i].size(0), half += sin[i].size(1);
  }
  TORCH_CHECK_VALUE(num_globals >= 0 && turned >= 0 && turned <= x.size(2) && half == x.size(3) / 2 && x.size(3) % 2 == 0 &&
                        num_globals + length == x.size(1), "x must be (N, ", num_globals, " + ", length, ", at least ", turned, ", ",
                    2 * half, ") for these tables, got ", x.sizes());
  if (!x.numel()) return;
  auto table = sin[0].scalar_type(), compute = in_table_dtype ? table : c10::promoteTypes(x.scalar_type(), table);
  Heads h{x.size(0), x.size(1), x.size(2), x.size(3) / 2, num_globals, turned,
          c10::promoteTypes(compute, x.scalar_type()) != compute, compute};
  with_accumulator({x.scalar_type(), compute}, [&](auto zero) {
    using A = decltype(zero);
    Angles<A> angles(sin, cos, h.half, back);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rope", [&] { run<A, scalar_t>(x, out, angles, h); });
  });
}

bool is_dense(const Tensor& x) { return x.dim() == 0 || x.size(-1) < 2 || x.stride(-1) == 1; }

Tensor rope(
    const Tensor& x,  // (N, g + L, heads, hd)
    bool back, int64_t num_globals, int64_t turned, bool in_table_dtype, at::IntArrayRef,
    at::TensorList sin,  // per axis (n_i, s_i); their product is L, their sum hd/2
    at::TensorList cos,  // like sin
    at::TensorList, const c10::List<std::optional<Tensor>>&, std::string_view, bool, bool, at::ScalarType,
    at::ScalarType) {  // -> like x, contiguous
  auto out = at::empty(x.sizes(), x.options());
  turn_into(is_dense(x) ? x : x.contiguous(), out, back, num_globals, turned, in_table_dtype, sin, cos);
  return out;
}

void rope_(
    Tensor& x,  // (N, g + L, heads, hd); no two elements share memory
    bool back, int64_t num_globals, int64_t turned, bool in_table_dtype, at::IntArrayRef,
    at::TensorList sin,  // per axis (n_i, s_i)
    at::TensorList cos,  // like sin
    at::TensorList, const c10::List<std::optional<Tensor>>&, std::string_view, bool, bool, at::ScalarType, at::ScalarType) {
  auto dense = is_dense(x) ? x : x.contiguous();
  turn_into(dense, dense, back, num_globals, turned, in_table_dtype, sin, cos);
  if (!dense.is_same(x)) x.copy_(dense);
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CPU, m) {
  m.impl("rope", rope);
  m.impl("rope_", rope_);
}

}  // namespace pcf
