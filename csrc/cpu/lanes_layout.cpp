#include "lanes_layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../common/threads.h"

namespace sk {
namespace {

constexpr int kNothing = kLanesCols;  // the column of the 0

uint8_t code_of(int64_t col) { return static_cast<uint8_t>((col & 0x1f) | (col & 0x20) << 2); }
int column_of(uint8_t code) { return (code & 0x1f) | (code & 0x80) >> 2; }

}  // namespace

LanesPack::LanesPack(const Csr& given) : shape{given.n, given.k} {
  const Snapshot snapshot(given);
  const Csr w = snapshot.csr();
  places.resize(w.nnz);
  heads.reserve(shape.blocks() * shape.groups());
  part_steps.push_back(0);
  std::vector<int32_t> next(w.row_offsets, w.row_offsets + w.n), end(w.n);
  for (int64_t part = 0; part < shape.parts(); part++) {
    const int64_t row0 = part * kLanesRows, rows = shape.rows_in(part);
    for (int64_t b = 0; b < shape.blocks(); b++) {
      const int64_t col0 = b * kLanesCols;
      std::vector<LanesHead> here(shape.groups_in(part));
      for (size_t g = 0; g < here.size(); g++) here[g] = {static_cast<uint8_t>(g), 0};
      for (int64_t i = 0; i < rows; i++) {
        int32_t p = next[row0 + i];
        while (p < w.row_offsets[row0 + i + 1] && w.col_indices[p] < col0 + kLanesCols) p++;
        end[row0 + i] = p;
        uint8_t& steps = here[i / kLanesGroup].steps;
        steps = static_cast<uint8_t>(std::max<int32_t>(steps, p - next[row0 + i]));
      }
      std::stable_sort(here.begin(), here.end(),
                       [](LanesHead a, LanesHead b) { return a.steps < b.steps; });
      for (const LanesHead& head : here) {
        const size_t first = cols.size();
        cols.resize(first + head.steps * kLanesGroup, code_of(kNothing));
        for (int64_t lane = 0; lane < kLanesGroup; lane++) {
          const int64_t i = head.group * kLanesGroup + lane;
          if (i >= rows) break;
          size_t at = first + lane;
          for (int32_t& p = next[row0 + i]; p < end[row0 + i]; p++, at += kLanesGroup) {
            cols[at] = code_of(w.col_indices[p] - col0);
            places[p] = static_cast<int64_t>(at);
          }
        }
        heads.push_back(head);
      }
    }
    part_steps.push_back(static_cast<int64_t>(cols.size()) / kLanesGroup);
  }
}

void check_lanes(const LanesShape& shape, const int64_t* part_steps, const LanesHead* heads,
                 int64_t steps, int64_t part) {
  const LanesHead* here = heads + shape.heads_before(part);
  const int64_t groups = shape.groups_in(part), count = shape.blocks() * groups;
  int64_t sum = 0;
  bool is_wrong = false;
  for (int64_t i = 0; i < count; i++) {
    sum += here[i].steps;
    is_wrong |= here[i].group >= groups;
  }
  const int64_t first = part_steps[part], end = part_steps[part + 1];
  is_wrong |= first < 0 || first > steps || end != first + sum || end > steps;
  if (is_wrong)
    throw std::invalid_argument(
        "part_steps, heads: expected what packing made, got other contents; pack the weight anew");
}

void lanes_to_dense(const LanesShape& shape, const int64_t* part_steps, const LanesHead* heads,
                    int64_t steps, const uint8_t* cols, const void* values, int element_bytes,
                    void* dense, int threads) {
  parallel_for(threads, shape.parts(), [&](int64_t part) {
    check_lanes(shape, part_steps, heads, steps, part);
    const LanesHead* head = heads + shape.heads_before(part);
    int64_t at = part_steps[part] * kLanesGroup;
    for (int64_t b = 0; b < shape.blocks(); b++)
      for (int64_t g = 0; g < shape.groups_in(part); g++, head++)
        for (int64_t i = 0; i < head->steps * kLanesGroup; i++, at++) {
          const int col = column_of(cols[at]);
          const int64_t column = b * kLanesCols + col;
          if (col == kNothing || column >= shape.k) continue;
          const int64_t row = part * kLanesRows + head->group * kLanesGroup + i % kLanesGroup;
          if (row >= shape.n) continue;
          std::memcpy(static_cast<char*>(dense) + (row * shape.k + column) * element_bytes,
                      static_cast<const char*>(values) + at * element_bytes, element_bytes);
        }
  });
}

}  // namespace sk
