#include "order.h"

#include <algorithm>
#include <numeric>

namespace sk {
namespace {

using Word = uint64_t;
constexpr int kWordBits = 64, kGroup = 4;
constexpr int kMostPartners = 512;  // columns, the fullest ones, that a second one is sought among
constexpr int kMostPairs = 256;     // columns that the third and fourth are sought among
constexpr int kTries = 4, kManyTries = 256;  // second columns that are tried, among many or few
constexpr int kFew = 512;                    // columns

// The search is most of the time of packing. Every x86-64 of today counts bits in one instruction.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SK_CLONES __attribute__((target_clones("arch=icelake-server", "arch=haswell", "default")))
#else
#define SK_CLONES
#endif

inline int64_t words_of(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }
inline int lowest(Word bits) { return __builtin_ctzll(bits); }

// How many rows each of `items` shares with a.
SK_CLONES void count_shared(const Word* a, const Word* columns, const int32_t* items, int64_t count,
                            int64_t words, int32_t* shared) {
  for (int64_t i = 0; i < count; ++i) {
    const Word* b = columns + items[i] * words;
    int64_t sum = 0;
    for (int64_t w = 0; w < words; ++w) sum += __builtin_popcountll(a[w] & b[w]);
    shared[i] = static_cast<int32_t>(sum);
  }
}

// The first of `items` that shares no row with a; count if there is none.
SK_CLONES int64_t find_disjoint(const Word* a, const Word* columns, const int32_t* items,
                                int64_t count, int64_t words) {
  constexpr int64_t kStep = 8;  // words at a time
  for (int64_t i = 0; i < count; ++i) {
    const Word* b = columns + items[i] * words;
    Word both = 0;
    for (int64_t w = 0; w < words && !both; w += kStep) {
      for (int64_t v = w; v < std::min(words, w + kStep); ++v) both |= a[v] & b[v];
    }
    if (!both) return i;
  }
  return count;
}

// Columns that have no slot yet, or rows that have none. `word` arrays are sets of rows.
class Pool {
 public:
  Pool(const Csr& w)
      : words_(words_of(w.n)),
        row_words_(words_of(w.k)),
        n_(w.n),
        columns_(w.k * words_),
        rows_(w.n * row_words_),
        counts_(w.k),
        items_(w.k) {
    for (int64_t row = 0; row < w.n; ++row) {
      for (int32_t i = w.row_offsets[row]; i < w.row_offsets[row + 1]; ++i) {
        const int32_t c = w.col_indices[i];
        columns_[c * words_ + row / kWordBits] |= Word{1} << row % kWordBits;
        rows_[row * row_words_ + c / kWordBits] |= Word{1} << c % kWordBits;
        ++counts_[c];
      }
    }
    std::iota(items_.begin(), items_.end(), 0);
    std::stable_sort(items_.begin(), items_.end(),
                     [&](int32_t a, int32_t b) { return counts_[a] > counts_[b]; });
  }

  int64_t size() const { return static_cast<int64_t>(items_.size()); }
  int64_t words() const { return words_; }
  const Word* rows_of(int32_t column) const { return &columns_[column * words_]; }

  // The next group: up to four columns whole, or parts of them in `rows` where they are split.
  struct Slot {
    int32_t column = -1;
    std::vector<Word> rest;  // rows that stay in the pool; empty if none do
  };
  using Group = Slot[kGroup];

  void next(Group& group) {
    const int32_t a = items_[0];
    items_.erase(items_.begin());
    group[0].column = a;
    if (items_.empty()) return;
    rank_partners(a);
    int32_t b = -1, c = -1, d = -1;
    const size_t tries = size() > kFew ? kTries : kManyTries;
    // Where no four fit: the third that brings the fewest rows to two.
    int32_t best_b = -1, best_c = -1;
    int64_t least = INT64_MAX;
    for (size_t t = 0; t < std::min(tries, partners_.size()); ++t) {
      b = partners_[t].column;
      split_rows(a, b);
      find_fitting(b);
      if (find_pair(&c, &d)) {
        group[1].column = b, group[2].column = c, group[3].column = d;
        for (int s = 1; s < kGroup; ++s) remove(group[s].column);
        return;
      }
      if (fitting_.empty()) continue;
      count(one_.data(), fitting_);
      const int64_t twos = bits(two_);
      for (size_t i = 0; i < fitting_.size(); ++i) {
        const int64_t cost = 2 * n_ * (shared_[i] + twos) - 3 * bits(one_) * counts_[fitting_[i]];
        if (cost < least) least = cost, best_b = b, best_c = fitting_[i];
      }
    }
    b = best_b < 0 ? partners_[0].column : best_b;
    split_rows(a, b);
    group[1].column = b;
    remove(b);
    c = best_c < 0 ? least_shared(two_) : best_c;
    if (c < 0) return;
    take(c, &group[2]);
    for (int64_t w = 0; w < words_; ++w) two_[w] |= placed_[w] & one_[w];
    d = least_shared(two_);
    if (d >= 0) take(d, &group[3]);
    for (int s = 2; s < kGroup; ++s) put_back(group[s]);
  }

 private:
  struct Partner {
    int64_t cost;
    int32_t column;
    bool operator<(const Partner& other) const { return cost < other.cost; }
  };

  void count(const Word* a, const std::vector<int32_t>& items) {
    const int64_t most = std::min<int64_t>(items.size(), kMostPartners);
    shared_.resize(most);
    count_shared(a, columns_.data(), items.data(), most, words_, shared_.data());
  }

  // The columns by how few rows they share with a, for so many as they have.
  void rank_partners(int32_t a) {
    count(rows_of(a), items_);
    partners_.resize(shared_.size());
    for (size_t i = 0; i < shared_.size(); ++i) {
      const int64_t expected = int64_t{3} * counts_[a] * counts_[items_[i]];
      partners_[i] = {2 * n_ * shared_[i] - expected, items_[i]};
    }
    const size_t tries = std::min<size_t>(size() > kFew ? kTries : kManyTries, partners_.size());
    std::partial_sort(partners_.begin(), partners_.begin() + tries, partners_.end());
  }

  // Rows of a and b: those with two entries, and those with one.
  void split_rows(int32_t a, int32_t b) {
    two_.resize(words_), one_.resize(words_);
    for (int64_t w = 0; w < words_; ++w) {
      two_[w] = rows_of(a)[w] & rows_of(b)[w];
      one_[w] = rows_of(a)[w] ^ rows_of(b)[w];
    }
  }

  // The fullest columns but b with no entry in the rows `two_`.
  void find_fitting(int32_t b) {
    std::vector<Word>& taken = taken_;
    taken.assign(row_words_, 0);
    for (int64_t w = 0; w < words_; ++w) {
      for (Word left = two_[w]; left; left &= left - 1) {
        const Word* row = &rows_[(w * kWordBits + lowest(left)) * row_words_];
        for (int64_t v = 0; v < row_words_; ++v) taken[v] |= row[v];
      }
    }
    fitting_.clear();
    for (const int32_t c : items_) {
      if (c == b || taken[c / kWordBits] >> c % kWordBits & 1) continue;
      fitting_.push_back(c);
      if (fitting_.size() == kMostPairs) break;
    }
  }

  // Two columns that fit, of which no row in `one_` has both.
  bool find_pair(int32_t* c, int32_t* d) {
    std::vector<Word>& only = placed_;
    only.resize(words_);
    const int64_t count = fitting_.size();
    for (int64_t i = 0; i + 1 < count; ++i) {
      for (int64_t w = 0; w < words_; ++w) only[w] = rows_of(fitting_[i])[w] & one_[w];
      const int64_t j =
          i + 1 +
          find_disjoint(only.data(), columns_.data(), &fitting_[i + 1], count - i - 1, words_);
      if (j == count) continue;
      *c = fitting_[i], *d = fitting_[j];
      return true;
    }
    return false;
  }

  // The column that shares the fewest rows with a, for so many as it has; -1 if each shares all.
  int32_t least_shared(const std::vector<Word>& a) {
    count(a.data(), items_);
    const int64_t size_of_a = bits(a);
    int32_t best = -1;
    int64_t least = INT64_MAX;
    for (size_t i = 0; i < shared_.size(); ++i) {
      const int32_t rows = counts_[items_[i]];
      if (rows > 0 && shared_[i] == rows) continue;
      const int64_t cost = 2 * n_ * shared_[i] - 3 * size_of_a * rows;
      if (cost < least) least = cost, best = items_[i];
    }
    return best;
  }

  // Takes the rows of a column that are not in `two_` for a slot, to `placed_`.
  void take(int32_t column, Slot* slot) {
    slot->column = column;
    remove(column);
    placed_.resize(words_);
    slot->rest.assign(words_, 0);
    for (int64_t w = 0; w < words_; ++w) {
      placed_[w] = rows_of(column)[w] & ~two_[w];
      slot->rest[w] = rows_of(column)[w] & two_[w];
    }
    if (!bits(slot->rest)) slot->rest.clear();
  }

  // What a slot has left of its column: another column from now on, of fewer rows.
  void put_back(const Slot& slot) {
    if (slot.rest.empty()) return;
    const int32_t c = slot.column;
    for (int64_t w = 0; w < words_; ++w) {
      Word& mine = columns_[c * words_ + w];
      for (Word gone = mine & ~slot.rest[w]; gone; gone &= gone - 1) {
        rows_[(w * kWordBits + lowest(gone)) * row_words_ + c / kWordBits] &=
            ~(Word{1} << c % kWordBits);
      }
      mine = slot.rest[w];
    }
    counts_[c] = static_cast<int32_t>(bits(slot.rest));
    const auto at = std::upper_bound(items_.begin(), items_.end(), counts_[c],
                                     [&](int32_t rows, int32_t o) { return rows > counts_[o]; });
    items_.insert(at, c);
  }

  void remove(int32_t column) { items_.erase(std::find(items_.begin(), items_.end(), column)); }

  static int64_t bits(const std::vector<Word>& rows) {
    int64_t sum = 0;
    for (const Word w : rows) sum += __builtin_popcountll(w);
    return sum;
  }

  int64_t words_, row_words_, n_;
  std::vector<Word> columns_, rows_;  // the same bits column by column and row by row
  std::vector<int32_t> counts_;       // rows of a column
  std::vector<int32_t> items_;        // columns in the pool, fullest first
  // Of the group in the making.
  std::vector<Word> one_, two_, placed_, taken_;
  std::vector<int32_t> fitting_, shared_;
  std::vector<Partner> partners_;
};

}  // namespace

Order::Order(const Csr& w, int64_t most_slots)
    : row_offsets_(w.row_offsets, w.row_offsets + w.n + 1),
      col_indices_(w.col_indices, w.col_indices + w.nnz),
      last_slot_(w.k) {
  Csr own = w;
  own.row_offsets = row_offsets_.data();
  own.col_indices = col_indices_.data();
  check(own);
  Pool pool(own);
  while (pool.size()) {
    if (slots() + pool.size() > most_slots) {
      columns_.clear();
      return;
    }
    std::vector<std::vector<Word>> before;
    Pool::Group group;
    pool.next(group);
    for (const Pool::Slot& slot : group) {
      const auto at = static_cast<int32_t>(columns_.size());
      columns_.push_back(slot.column);
      if (slot.column < 0) continue;
      last_slot_[slot.column] = at;
      if (!slot.rest.empty()) parts_.push_back({slot.column, at, slot.rest});
    }
  }
  std::stable_sort(parts_.begin(), parts_.end(),
                   [](const Part& a, const Part& b) { return a.column < b.column; });
}

void Order::write(int32_t* columns, int32_t* places) const {
  std::copy(columns_.begin(), columns_.end(), columns);
  const auto rows = static_cast<int64_t>(row_offsets_.size()) - 1;
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t i = row_offsets_[row]; i < row_offsets_[row + 1]; ++i) {
      const int32_t c = col_indices_[i];
      // A part knows the rows that it leaves to later ones.
      auto part = std::lower_bound(parts_.begin(), parts_.end(), c,
                                   [](const Part& p, int32_t column) { return p.column < column; });
      while (part != parts_.end() && part->column == c &&
             part->rows[row / kWordBits] >> row % kWordBits & 1) {
        ++part;
      }
      places[i] = part != parts_.end() && part->column == c ? part->slot : last_slot_[c];
    }
  }
}

}  // namespace sk
