// Global tokens on their way from plane to plane: rows of M times the rows of old slices, summed in double.
#pragma once

#include "planes.h"
#include "rows.h"

namespace pcf {

// total (C) += weight * row (C)
template <class A>
void accumulate(double* total, double weight, const A* row, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) total[c] += weight * static_cast<double>(row[c]);
}

// For each volume b, new slice o and token, in parallel: finish(A* row, b, o, token), the row being M's row o times the
// old globals. Where M's rows are all alike it is computed once and o is 0.
//   read(A* row, int64_t b, int64_t slice, int64_t token): the globals of an old slice
template <class A, class Read, class Finish>
void pool_globals(const RowMap& map, const std::vector<Band>& m, bool alike, int64_t channels, const Read& read,
                  const Finish& finish) {
  auto rows = alike ? 1 : map.num_out;
  auto grain = std::max<int64_t>(1, GRAIN / (4 * std::max<int64_t>(channels, 1)));
  at::parallel_for(0, map.batch * rows * map.num_globals, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> row(channels);
    std::vector<double> total(channels);
    for (auto job = begin; job < end; ++job) {
      auto token = job % map.num_globals, o = job / map.num_globals % rows, b = job / map.num_globals / rows;
      auto& band = m[o];
      std::fill(total.begin(), total.end(), 0.0);
      for (size_t k = 0; k < band.weights.size(); ++k) {
        read(row.data(), b, band.first + static_cast<int64_t>(k), token);
        accumulate(total.data(), band.weights[k], row.data(), channels);
      }
      std::copy(total.begin(), total.end(), row.begin());
      finish(row.data(), b, o, token);
    }
  });
}

}  // namespace pcf
