// Backward of add_norm.cpp: the norm's once per new row, then rows go back and globals through the transpose of M.
// Sums over rows go by chunks whose number follows from sizes alone, so that they are the same for any number of threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <utility>

#include "globals.h"
#include "norm.h"

namespace pcf {
namespace {

constexpr int64_t CHUNKS = 256;  // at most; of rows whose sums are added up one after another
constexpr int64_t FEW = 16;      // rows that are added up in float before they are in double

template <class A>
struct Sums {  // partial sums of a few rows, (C) each, or null
  A *scale, *weight, *bias;
};

template <class A>
class Backward {
 public:
  Input<A> grad, grad_normed, y, branch;  // (..., C), or nothing; branch is of the old rows
  std::vector<A> scale, weight;           // (C), or empty
  Output<A> grad_x, grad_branch;          // old rows
  const A *mean, *rstd;                   // one per new row, or null
  Norm norm;
  int64_t channels;

  struct Scratch {
    std::vector<A> total, g, xhat;
    A* row() { return total.data(); }
  };
  Scratch scratch() const { return {std::vector<A>(channels), std::vector<A>(channels), std::vector<A>(channels)}; }

  // The gradient of a new row of the sum.
  void row(Scratch& s, int64_t i, const Sums<A>& sums) const {
    auto total = s.row();
    if (norm == Norm::none) {
      grad.read(total, i);
      return;
    }
    auto g = s.g.data(), xhat = s.xhat.data();
    grad_normed.read(g, i);
    y.read(xhat, i);
    normalize<A, A>(xhat, xhat, Statistics<A>{mean ? mean[i] : A(0), rstd[i]}, nullptr, nullptr, channels);
    auto sum = Lanes<A>::all(0), product = sum;
    pieces<A>(channels, [&](int64_t c, auto n) {
      auto v = Lanes<A>::load(g + c, n), x = Lanes<A>::load(xhat + c, n);
      if (sums.bias) (Lanes<A>::load(sums.bias + c, n) + v).store(sums.bias + c, n);
      if (sums.weight) Lanes<A>::fma(v, x, Lanes<A>::load(sums.weight + c, n)).store(sums.weight + c, n);
      if (!weight.empty()) v = v * Lanes<A>::load(weight.data() + c, n);
      v.store(g + c, n);
      sum = sum + v;
      product = Lanes<A>::fma(v, x, product);
    });
    auto average = Lanes<A>::all(norm == Norm::layer ? sum.sum() / channels : A(0));
    auto slope = Lanes<A>::all(-product.sum() / channels), inverse = Lanes<A>::all(rstd[i]);
    pieces<A>(channels, [&](int64_t c, auto n) {
      auto v = Lanes<A>::load(g + c, n), x = Lanes<A>::load(xhat + c, n);
      (Lanes<A>::fma(x, slope, v - average) * inverse).store(total + c, n);
    });
    if (grad) grad.add(total, i);
  }

  // What the gradient of an old row of the sum gives.
  void finish(Scratch& s, int64_t i, const Sums<A>& sums) const {
    auto total = s.row();
    grad_x.write(i, total);
    if (sums.scale) {
      branch.read(s.g.data(), i);
      pieces<A>(channels, [&](int64_t c, auto n) {
        auto v = Lanes<A>::load(total + c, n), b = Lanes<A>::load(s.g.data() + c, n);
        Lanes<A>::fma(v, b, Lanes<A>::load(sums.scale + c, n)).store(sums.scale + c, n);
      });
    }
    if (!grad_branch) return;
    if (!scale.empty())
      pieces<A>(channels, [&](int64_t c, auto n) {
        (Lanes<A>::load(total + c, n) * Lanes<A>::load(scale.data() + c, n)).store(total + c, n);
      });
    grad_branch.write(i, total);
  }
};

// Partial sums of all chunks, and how work is cut into them.
template <class A>
class Partials {
 public:
  Partials(std::array<bool, 3> wanted, int64_t channels) : wanted_(wanted), channels_(channels) {
    for (auto one : wanted) count_ += one;
  }
  // f(begin, end, sums) for all of 0 ... jobs, in chunks that run in parallel.
  template <class F>
  void run(int64_t jobs, int64_t job_rows, const F& f) {
    auto size = std::max({(jobs + CHUNKS - 1) / CHUNKS, GRAIN / std::max<int64_t>(1, job_rows * channels_), int64_t(1)});
    auto chunks = (jobs + size - 1) / size, stride = count_ * channels_;
    auto few = std::max<int64_t>(1, FEW / std::max<int64_t>(1, job_rows));
    std::vector<double> values(chunks * stride, 0.0);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> block(stride);
      auto at = block.data();
      A* place[3];
      for (int k = 0; k < 3; ++k) place[k] = wanted_[k] ? std::exchange(at, at + channels_) : nullptr;
      for (auto chunk = begin; chunk < end; ++chunk) {
        auto last = std::min(jobs, (chunk + 1) * size);
        for (auto job = chunk * size; job < last; job += few) {
          std::fill(block.begin(), block.end(), A(0));
          f(job, std::min(last, job + few), Sums<A>{place[0], place[1], place[2]});
          accumulate(values.data() + chunk * stride, 1.0, block.data(), stride);
        }
      }
    });
    totals_.resize(stride);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) accumulate(totals_.data(), 1.0, values.data() + chunk * stride, stride);
  }
  void write(const Tensor& sums) const {  // (wanted, C)
    if (!sums.numel()) return;
    std::vector<A> row(channels_);
    Output<A> out(sums);
    for (int64_t k = 0; k < count_; ++k) {
      for (int64_t c = 0; c < channels_; ++c) row[c] = totals_.empty() ? A(0) : static_cast<A>(totals_[k * channels_ + c]);
      out.write(k, row.data());
    }
  }

 private:
  std::array<bool, 3> wanted_;
  int64_t channels_, count_ = 0;
  std::vector<double> totals_;
};

template <class A>
void run_globals(const RowMap& map, const Backward<A>& backward, Partials<A>& partials, const at::TensorOptions& options,
                 int64_t via, bool mean) {
  auto channels = backward.channels;
  auto rows = map.batch * map.num_out * map.num_globals;
  auto found = at::empty({rows, channels}, options.dtype(c10::CppTypeToScalarType<A>::value));
  auto at = found.template mutable_data_ptr<A>();
  partials.run(rows, 1, [&](int64_t begin, int64_t end, const Sums<A>& sums) {
    auto s = backward.scratch();
    for (auto job = begin; job < end; ++job) {
      auto token = job % map.num_globals, slice = job / map.num_globals;
      backward.row(s, map.new_global(0, slice, token), sums);
      std::copy_n(s.row(), channels, at + job * channels);
    }
  });
  auto columns = transposed(bands(map.num_in, map.num_out, via, mean), map.num_in);
  std::vector<double> summed;  // PCm: of all new slices, whose rows of M are alike
  if (mean) {
    summed.resize(map.batch * map.num_globals * channels);
    for (int64_t job = 0; job < rows; ++job) {
      auto b = job / map.num_globals / map.num_out, token = job % map.num_globals;
      accumulate(summed.data() + (b * map.num_globals + token) * channels, 1.0, at + job * channels, channels);
    }
  }
  partials.run(map.batch * map.num_in * map.num_globals, 1, [&](int64_t begin, int64_t end, const Sums<A>& sums) {
    auto s = backward.scratch();
    std::vector<double> total(channels);
    for (auto job = begin; job < end; ++job) {
      auto token = job % map.num_globals, slice = job / map.num_globals % map.num_in, b = job / map.num_globals / map.num_in;
      auto& column = columns[slice];
      std::fill(total.begin(), total.end(), 0.0);
      for (size_t k = 0; k < column.weights.size(); ++k) {
        if (mean) {
          accumulate(total.data(), column.weights[k], summed.data() + (b * map.num_globals + token) * channels, channels);
        } else {
          auto from = (b * map.num_out + column.first + static_cast<int64_t>(k)) * map.num_globals + token;
          accumulate(total.data(), column.weights[k], at + from * channels, channels);
        }
      }
      std::copy(total.begin(), total.end(), s.row());
      backward.finish(s, map.old_global(b, slice, token), sums);
    }
  });
}

template <class A>
void run(const RowMap& map, const Backward<A>& backward, Partials<A>& partials, const at::TensorOptions& options,
         int64_t via, bool mean) {
  partials.run(map.lines(), map.n[2], [&](int64_t begin, int64_t end, const Sums<A>& sums) {
    auto s = backward.scratch();
    for (auto line = begin; line < end; ++line) {
      auto old = map.old_row(line), now = map.new_row(line);
      for (int64_t i = 0; i < map.n[2]; ++i) {
        backward.row(s, now + i, sums);
        backward.finish(s, old + i * map.step[2], sums);
      }
    }
  });
  if (map.num_globals) run_globals(map, backward, partials, options, via, mean);
}

std::tuple<Tensor, Tensor, Tensor> add_norm_backward(
    const OptionalTensor& grad,         // of the sum, (B*P2, g + L2, C), contiguous
    const OptionalTensor& grad_normed,  // of its norm, like grad
    const Tensor& y,                    // the sum, like grad
    const Tensor& mean,                 // (B*P2, g + L2)
    const Tensor& rstd,                 // (B*P2, g + L2)
    const OptionalTensor& weight,       // (C,)
    const OptionalTensor& branch,       // (B*P1, g + L1, C), contiguous; only for scale's gradient
    const OptionalTensor& scale,        // (C,)
    std::string_view old, std::string_view next, at::IntArrayRef sizes, int64_t num_globals, int64_t via, bool mean_pooled,
    std::string_view norm, std::array<bool, 3> wanted, at::ScalarType x_dtype, std::optional<at::ScalarType> branch_dtype,
    at::ScalarType sums_dtype) {
  // -> gradients of x and branch (B*P1, g + L1, C), and of scale, weight and bias as wanted (wanted, C)
  auto before = Plane::named(old), after = Plane::named(next);
  auto channels = y.size(2);
  RowMap reversed(y.size(0), y.size(1), after, before, sizes, num_globals);  // checks what is given
  auto batch = reversed.batch;
  RowMap map(batch * before.slices(sizes), reversed.out_seq, before, after, sizes, num_globals);
  auto normed = norm != "none";
  TORCH_CHECK_VALUE(via > 0 && (grad || grad_normed) && (!normed || grad_normed), "via, grad or grad_normed is missing");
  for (auto& t : {grad, grad_normed, OptionalTensor(y)})
    TORCH_CHECK_VALUE(!t || (t->is_contiguous() && t->sizes() == y.sizes()), "gradients must be contiguous, of shape ", y.sizes());
  TORCH_CHECK_VALUE(!normed || (rstd.numel() == y.size(0) * y.size(1) && (norm != "layer" || mean.numel() == rstd.numel())),
                    "mean and rstd must have an element per row");
  TORCH_CHECK_VALUE(!wanted[0] || (branch && branch->is_contiguous() && branch->numel() == batch * map.num_in * map.in_seq * channels),
                    "branch must be contiguous and of the old rows' shape");
  std::vector<int64_t> rows{batch * map.num_in, map.in_seq, channels};
  auto grad_x = at::empty(rows, y.options().dtype(x_dtype));
  auto grad_branch = at::empty(branch_dtype ? rows : std::vector<int64_t>{0}, y.options().dtype(branch_dtype.value_or(x_dtype)));
  auto sums = at::empty({wanted[0] + wanted[1] + wanted[2], channels}, y.options().dtype(sums_dtype));
  // Of float32 in double: differences of rows that nearly cancel are to be as close to float64 as torch's.
  auto wide = y.scalar_type() == at::kFloat ? at::kDouble : y.scalar_type();
  with_accumulator({wide, x_dtype, sums_dtype}, [&](auto zero) {
    using A = decltype(zero);
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    auto average = mean.to(type).contiguous(), inverse = rstd.to(type).contiguous();
    auto pointer = [](const Tensor& t) { return t.numel() ? t.const_data_ptr<A>() : nullptr; };
    Partials<A> partials(wanted, channels);
    Backward<A> backward{Input<A>(grad), Input<A>(grad_normed), Input<A>(y), Input<A>(branch), vector_of<A>(scale, channels),
                         vector_of<A>(weight, channels), Output<A>(grad_x), Output<A>(grad_branch), pointer(average), pointer(inverse),
                         norm_named(norm), channels};
    if (y.numel()) run(map, backward, partials, y.options(), via, mean_pooled);
    partials.write(sums);
  });
  return {grad_x, grad_branch, sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CPU, m) { m.impl("add_norm_backward", add_norm_backward); }

}  // namespace pcf
