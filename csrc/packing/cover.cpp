#include "cover.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "../common/threads.h"

namespace sk {
namespace {

constexpr int kSlots = kCoverGroups * kCoverGroup;  // of a step

// Slots of the columns of one tile, whole groups.
struct Columns {
  int count = 0;
  uint32_t rows[kCoverWindow];
  uint8_t col[kCoverWindow];
};

// Costs and gains of a column, in sixteenths of a row that it brings into a group.
constexpr int kGain = 16;
constexpr int kConflict = 64;  // a bank that is taken: fewer conflicts, 2 % more slots
constexpr int kClosedCosts[] = {16, 32, 64};  // a row that is left over; each is tried

// The search is most of the time of packing, and vectors make it three times as fast.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SK_CLONES
#endif

inline int count_bits(uint32_t x) {  // in a form that compilers vectorise
  x -= (x >> 1) & 0x55555555u;
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  x += x >> 8;
  return (x + (x >> 16)) & 0x3f;
}

// Position in `pool` of the column that suits a group best: many rows in `open`, few in `closed`,
// and a bank of shared memory (its column modulo 8) that the group does not use yet.
SK_CLONES int choose(const Columns& pool, uint32_t open, uint32_t closed, unsigned banks,
                     int closed_cost) {
  int32_t key[kCoverWindow];
  for (int i = 0; i < pool.count; i++) {
    const int gain = kGain * count_bits(pool.rows[i] & open);
    const int loss = closed_cost * count_bits(pool.rows[i] & closed);
    const int conflict = kConflict * (banks >> (pool.col[i] & 7) & 1);
    key[i] = (gain - loss - conflict) * kCoverWindow - i;
  }
  int32_t best = key[0];
  for (int i = 1; i < pool.count; i++) best = std::max(best, key[i]);
  return (kCoverWindow - (best & (kCoverWindow - 1))) & (kCoverWindow - 1);
}

// Groups of four slots that hold all of `pool`. What a slot leaves of a column goes back there.
template <class Slot>
void make_groups(Columns pool, int closed_cost, std::vector<Slot>& slots) {
  unsigned banks = 0;  // of two groups, which are read together
  while (pool.count) {
    uint32_t closed = 0;  // rows with a value
    if (slots.size() % (2 * kCoverGroup) == 0) banks = 0;
    for (int s = 0; s < kCoverGroup; s++) {
      const int i = pool.count ? choose(pool, ~closed, closed, banks, s ? closed_cost : 0) : 0;
      const uint32_t rows = pool.count ? pool.rows[i] & ~closed : 0;
      if (!rows) {
        slots.push_back({0, 0});
        continue;
      }
      slots.push_back({rows, pool.col[i]});
      banks |= 1u << (pool.col[i] & 7);
      pool.rows[i] &= closed;
      closed |= rows;
      if (!pool.rows[i]) {
        pool.count--;
        pool.rows[i] = pool.rows[pool.count];
        pool.col[i] = pool.col[pool.count];
      }
    }
  }
}

// How many of 8 columns want the same bank.
template <class Slot>
int conflicts(const Slot* a, const Slot* b) {
  int used[8] = {};
  for (int s = 0; s < kCoverGroup; s++) {
    if (a[s].rows) used[a[s].col & 7]++;
    if (b[s].rows) used[b[s].col & 7]++;
  }
  return *std::max_element(used, used + 8);
}

// Whole steps. The two groups that are read together are chosen for different banks, and a slot
// that is empty reads from a bank that no other one needs.
template <class Slot>
void make_steps(std::vector<Slot>& slots) {
  slots.resize((slots.size() + kSlots - 1) / kSlots * kSlots, {0, 0});
  for (size_t pair = 0; pair < slots.size(); pair += 2 * kCoverGroup) {
    Slot* a = &slots[pair];
    Slot* partner = a + kCoverGroup;
    int least = conflicts(a, partner);
    for (size_t b = pair + 2 * kCoverGroup; b < slots.size() && least > 1; b += kCoverGroup) {
      const int count = conflicts(a, &slots[b]);
      if (count < least) partner = &slots[b], least = count;
    }
    std::swap_ranges(partner, partner + kCoverGroup, a + kCoverGroup);
    bool used[8] = {};
    for (size_t s = pair; s < pair + 2 * kCoverGroup; s++) {
      if (slots[s].rows) used[slots[s].col & 7] = true;
    }
    for (size_t s = pair; s < pair + 2 * kCoverGroup; s++) {
      if (slots[s].rows) continue;
      slots[s].col = static_cast<uint8_t>(std::find(used, used + 8, false) - used);
      used[slots[s].col] = true;
    }
  }
}

void check_order(const std::vector<int32_t>& row_order, int64_t n) {
  std::vector<bool> is_there(n);
  int64_t missing = n;
  for (int32_t row : row_order) {
    if (row == -1) continue;
    if (row < 0 || row >= n || is_there[row])
      throw std::invalid_argument("row_order: expected each row once, and -1");
    is_there[row] = true;
    missing--;
  }
  if (missing) throw std::invalid_argument("row_order: expected all rows");
}

}  // namespace

Cover::Cover(const Csr& w, const int32_t* row_order, int64_t slices, int threads)
    : row_offsets_(w.row_offsets, w.row_offsets + w.n + 1),
      col_indices_(w.col_indices, w.col_indices + w.nnz),
      row_order_(row_order, row_order + slices * kCoverRows),
      slices_(slices),
      windows_((w.k + kCoverWindow - 1) / kCoverWindow),
      threads_(threads),
      slots_(slices),
      step_offsets_(slices * windows_ + 1) {
  Csr own = w;
  own.row_offsets = row_offsets_.data();
  own.col_indices = col_indices_.data();
  check(own);
  check_order(row_order_, w.n);
  parallel_for(threads_, slices_, [&](int64_t slice) {
    std::array<int32_t, kCoverRows> next = {}, end = {};
    for (int r = 0; r < kCoverRows; r++) {
      const int32_t row = row_order_[slice * kCoverRows + r];
      if (row < 0) continue;
      next[r] = row_offsets_[row];
      end[r] = row_offsets_[row + 1];
    }
    std::vector<Slot> slots, others;
    for (int64_t window = 0; window < windows_; window++) {
      uint32_t rows[kCoverWindow] = {};
      const int64_t first = window * kCoverWindow, last = first + kCoverWindow;
      for (int r = 0; r < kCoverRows; r++) {
        for (; next[r] < end[r] && col_indices_[next[r]] < last; next[r]++) {
          rows[col_indices_[next[r]] - first] |= uint32_t{1} << r;
        }
      }
      Columns pool;
      for (int c = 0; c < kCoverWindow; c++) {
        if (!rows[c]) continue;
        pool.rows[pool.count] = rows[c];
        pool.col[pool.count++] = static_cast<uint8_t>(c);
      }
      // Dense tiles want full groups, sparse ones whole columns.
      slots.clear();
      for (int closed_cost : kClosedCosts) {
        others.clear();
        make_groups(pool, closed_cost, others);
        if (slots.empty() || others.size() < slots.size()) slots.swap(others);
      }
      make_steps(slots);
      step_offsets_[slice * windows_ + window + 1] = slots.size() / kSlots;
      slots_[slice].insert(slots_[slice].end(), slots.begin(), slots.end());
    }
  });
  for (size_t i = 1; i < step_offsets_.size(); i++) step_offsets_[i] += step_offsets_[i - 1];
}

void Cover::write(int32_t* step_offsets, uint8_t* records, int64_t* places, int value_bytes) const {
  const int64_t record_bytes = cover_record_bytes(value_bytes);
  std::copy(step_offsets_.begin(), step_offsets_.end(), step_offsets);
  parallel_for(threads_, slices_, [&](int64_t slice) {
    std::array<int32_t, kCoverRows> next = {}, end = {};
    for (int r = 0; r < kCoverRows; r++) {
      const int32_t row = row_order_[slice * kCoverRows + r];
      if (row < 0) continue;
      next[r] = row_offsets_[row];
      end[r] = row_offsets_[row + 1];
    }
    std::vector<int32_t> entry(kCoverRows * kCoverWindow);  // of each place of the tile
    const Slot* slots = slots_[slice].data();
    for (int64_t window = 0; window < windows_; window++) {
      const int64_t first = window * kCoverWindow, last = first + kCoverWindow;
      for (int r = 0; r < kCoverRows; r++) {
        for (; next[r] < end[r] && col_indices_[next[r]] < last; next[r]++) {
          entry[r * kCoverWindow + col_indices_[next[r]] - first] = next[r];
        }
      }
      const int64_t* steps = &step_offsets_[slice * windows_ + window];
      for (int64_t step = steps[0]; step < steps[1]; step++, slots += kSlots) {
        uint8_t* record = records + step * record_bytes;
        uint8_t* positions = record + kCoverValues * value_bytes;
        uint8_t* cols = record + record_bytes - kSlots;
        for (int s = 0; s < kSlots; s++) cols[s] = slots[s].col;
        for (int group = 0; group < kCoverGroups; group++) {
          const Slot* four = slots + group * kCoverGroup;
          for (int r = 0; r < kCoverRows; r++) {
            int at = 0;
            while (at < kCoverGroup && !(four[at].rows >> r & 1)) at++;
            if (at == kCoverGroup) continue;
            // Row r = 16 tile + 8 half + g. Lane (g, t) has the values of groups t and t + 4, lane
            // (g, 2 tile + u) the positions in groups 4 u .. 4 u + 3, a nibble each, of rows g and
            // g + 8, two bits each.
            const int tile = r / 16, half = r / 8 % 2, g = r % 8;
            const int lane = g * 4 + group % 4, reg = group / 4 * 2 + half;
            places[entry[r * kCoverWindow + four[at].col]] =
                step * (record_bytes / value_bytes) + lane * 8 + tile * 4 + reg;
            const int bit = group % 4 * 4 + half * 2;
            positions[(g * 4 + 2 * tile + group / 4) * 2 + bit / 8] |= at << bit % 8;
          }
        }
      }
    }
  });
}

}  // namespace sk
