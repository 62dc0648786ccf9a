// plane_switch: rows from one plane's order to another's, globals through M or its transpose. See ops/plane_switch.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "globals.h"

namespace pcf {
namespace {

// M is always that from `in` to `out`, or where `transposed_m` the transpose of that from `out` to `in`.
void switch_globals(const Tensor& x, const Tensor& out, const RowMap& map, int64_t via, bool mean, bool transposed_m) {
  auto channels = x.size(2);
  with_accumulator({x.scalar_type()}, [&](auto zero) {
    using A = decltype(zero);
    Input<A> from(x);
    Output<A> to(out);
    auto read = [&](A* row, int64_t b, int64_t slice, int64_t token) { from.read(row, map.old_global(b, slice, token)); };
    auto write = [&](const A* row, int64_t b, int64_t o, int64_t token) { to.write(map.new_global(b, o, token), row); };
    if (!transposed_m && !mean) return pool_globals<A>(map, bands(map.num_in, map.num_out, via, false), false, channels, read, write);
    if (!transposed_m) {
      auto to_all = [&](const A* row, int64_t b, int64_t, int64_t token) {
        for (int64_t o = 0; o < map.num_out; ++o) write(row, b, o, token);
      };
      return pool_globals<A>(map, bands(map.num_in, map.num_out, via, true), true, channels, read, to_all);
    }
    auto m = transposed(bands(map.num_out, map.num_in, via, mean), map.num_out);
    if (!mean) return pool_globals<A>(map, m, false, channels, read, write);
    // Rows of M are all alike, so its columns are multiples of the sum of all slices.
    std::vector<Band> sum{Band{0, std::vector<double>(map.num_in, 1.0)}};
    pool_globals<A>(map, sum, true, channels, read, [&](const A* row, int64_t b, int64_t, int64_t token) {
      std::vector<A> scaled(channels);
      for (int64_t o = 0; o < map.num_out; ++o) {
        std::transform(row, row + channels, scaled.begin(), [&](A v) { return static_cast<A>(m[o].weights[0] * v); });
        write(scaled.data(), b, o, token);
      }
    });
  });
}

Tensor plane_switch(
    const Tensor& given,  // (B*P1, g + L1, C)
    std::string_view old, std::string_view next, at::IntArrayRef sizes, int64_t num_globals, int64_t via, bool mean,
    bool transposed_m) {  // -> (B*P2, g + L2, C)
  TORCH_CHECK_VALUE(given.dim() == 3, "x must be (B*P, g + L, C), got ", given.sizes());
  auto x = given.contiguous();
  auto before = Plane::named(old), after = Plane::named(next);
  RowMap map(x.size(0), x.size(1), before, after, sizes, num_globals);
  TORCH_CHECK_VALUE(via > 0, "via must be at least 1, got ", via);
  auto out = at::empty({map.batch * map.num_out, map.out_seq, x.size(2)}, x.options());
  auto bytes = x.size(2) * x.element_size();
  if (!x.numel()) return out;
  auto from = static_cast<const char*>(x.const_data_ptr());
  auto to = static_cast<char*>(out.mutable_data_ptr());
  auto grain = std::max<int64_t>(1, GRAIN / (map.n[2] * x.size(2)));
  at::parallel_for(0, map.lines(), grain, [&](int64_t begin, int64_t end) {
    for (auto line = begin; line < end; ++line) {
      auto source = from + map.old_row(line) * bytes;
      auto target = to + map.new_row(line) * bytes;
      if (map.step[2] == 1) {
        std::memcpy(target, source, map.n[2] * bytes);
        continue;
      }
      for (int64_t i = 0; i < map.n[2]; ++i) std::memcpy(target + i * bytes, source + i * map.step[2] * bytes, bytes);
    }
  });
  if (num_globals) switch_globals(x, out, map, via, mean, transposed_m);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CPU, m) { m.impl("plane_switch", plane_switch); }

}  // namespace pcf
