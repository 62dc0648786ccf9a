// Planes of a volume, and where rows go when one plane's order becomes another's: planes.py and pooling.py in C++.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <vector>

namespace pcf {

struct Plane {
  std::array<int64_t, 3> axes;  // of D, H, W (0, 1, 2), slowest first: the batch axis, then the sequence's
  bool has_batch;               // false for DHW, whose three axes are one sequence

  static Plane named(std::string_view name) {
    if (name == "HW") return {{0, 1, 2}, true};
    if (name == "DW") return {{1, 0, 2}, true};
    if (name == "DH") return {{2, 0, 1}, true};
    TORCH_CHECK_VALUE(name == "DHW", "plane must be one of HW, DW, DH, DHW, got ", std::string(name));
    return {{0, 1, 2}, false};
  }
  int64_t slices(at::IntArrayRef sizes) const { return has_batch ? sizes[axes[0]] : 1; }
  int64_t length(at::IntArrayRef sizes) const { return sizes[0] * sizes[1] * sizes[2] / std::max<int64_t>(slices(sizes), 1); }
};

// A change of planes, in rows of contiguous tensors (B*P, g + L, C).
struct RowMap {
  int64_t batch, num_globals;
  int64_t num_in, num_out;  // slices
  int64_t in_seq, out_seq;  // rows of a sequence
  std::array<int64_t, 3> n, step;  // sizes of the new plane's axes, slowest first, and old rows from one to the next

  // Of old tensors (sequences, rows, C).
  RowMap(int64_t sequences, int64_t rows_of_each, const Plane& before, const Plane& after, at::IntArrayRef sizes, int64_t g)
      : num_globals(g), outer_(after.has_batch) {
    TORCH_CHECK_VALUE(sizes.size() == 3 && sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0 && g >= 0,
                      "sizes must be (D, H, W), at least 1 each, with globals from 0, got ", sizes, " and ", g);
    num_in = before.slices(sizes), num_out = after.slices(sizes);
    in_seq = g + before.length(sizes), out_seq = g + after.length(sizes);
    TORCH_CHECK_VALUE(sequences % num_in == 0 && rows_of_each == in_seq, "rows must be (B*", num_in, ", ", in_seq,
                      ", C), got (", sequences, ", ", rows_of_each, ", C)");
    batch = sequences / num_in;
    std::array<int64_t, 3> stride;  // of D, H, W in old rows
    int64_t rows = 1;
    for (int k = 2; k >= 0; --k) {
      auto axis = before.axes[k];
      stride[axis] = before.has_batch && k == 0 ? in_seq : rows;
      rows *= sizes[axis];
    }
    for (int k = 0; k < 3; ++k) n[k] = sizes[after.axes[k]], step[k] = stride[after.axes[k]];
  }
  // Lines are runs of n[2] patches along the new plane's fastest axis: batch * n[0] * n[1] of them.
  int64_t lines() const { return batch * n[0] * n[1]; }
  int64_t old_row(int64_t line) const {
    auto b = line / (n[0] * n[1]), i0 = line / n[1] % n[0], i1 = line % n[1];
    return b * num_in * in_seq + num_globals + i0 * step[0] + i1 * step[1];
  }
  int64_t new_row(int64_t line) const {
    auto b = line / (n[0] * n[1]), i0 = line / n[1] % n[0], i1 = line % n[1];
    auto slice = outer_ ? i0 * out_seq : i0 * n[1] * n[2];
    return b * num_out * out_seq + num_globals + slice + i1 * n[2];
  }
  int64_t old_global(int64_t b, int64_t slice, int64_t token) const { return (b * num_in + slice) * in_seq + token; }
  int64_t new_global(int64_t b, int64_t slice, int64_t token) const { return (b * num_out + slice) * out_seq + token; }

 private:
  bool outer_;  // whether the new plane's slowest axis counts sequences
};

// A row of the matrix M that takes globals from plane to plane: consecutive columns.
struct Band {
  int64_t first;
  std::vector<double> weights;
};

// M (num_next, num_prev) = A(via -> num_next) @ A(num_prev -> via), or with a mean as its last step: one row for all.
inline std::vector<Band> bands(int64_t num_prev, int64_t num_next, int64_t via, bool mean) {
  auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  auto rows = mean ? 1 : num_next;
  std::vector<Band> found(rows);
  for (int64_t i = 0; i < rows; ++i) {
    auto begin = i * via / rows, end = up((i + 1) * via, rows);
    auto first = begin * num_prev / via, last = up(end * num_prev, via);
    found[i] = {first, std::vector<double>(last - first)};
    for (auto d = begin; d < end; ++d) {
      auto from = d * num_prev / via, to = up((d + 1) * num_prev, via);
      for (auto p = from; p < to; ++p) found[i].weights[p - first] += 1.0 / (double(end - begin) * double(to - from));
    }
  }
  return found;
}

// Rows of M's transpose, (num_prev, num_next) of them; M's rows are bands that only move on.
inline std::vector<Band> transposed(const std::vector<Band>& rows, int64_t num_prev) {
  std::vector<Band> found(num_prev, Band{-1, {}});
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t k = 0; k < rows[i].weights.size(); ++k) {
      auto& column = found[rows[i].first + k];
      if (column.first < 0) column.first = i;
      column.weights.resize(i - column.first, 0.0);
      column.weights.push_back(rows[i].weights[k]);
    }
  }
  return found;
}

}  // namespace pcf
