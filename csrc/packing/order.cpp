#include "order.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "quads.h"

namespace sk {
namespace {

using Word = uint64_t;
constexpr int kWordBits = 64, kGroup = 4;
constexpr int kMostPartners = 512;  // columns, the fullest ones, that a second one is sought among
constexpr int kMostFitting = 256;   // that the third and fourth are sought among
constexpr int64_t kFew = 512;       // columns in the pool
constexpr int kTries = 4, kTriesOfFew = 256;  // second columns that are tried
constexpr int kMostQuads = 3000, kMostSteps = 3000;

// The search is most of the time of packing, and an instruction that counts bits is most of it.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SK_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SK_CLONES
#endif

inline int64_t words_of(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }
inline int lowest(Word bits) { return __builtin_ctzll(bits); }
inline bool has(const Word* set, int64_t i) { return set[i / kWordBits] >> i % kWordBits & 1; }

// How many rows each of `items` shares with a. A column is `words` words, a bit for a row.
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

struct Slot {
  int32_t column = -1;
  std::vector<Word> rest;  // rows of the column that later slots hold; empty if there are none
};

// The columns, or what is left of them, that have no slot yet.
class Pool {
 public:
  explicit Pool(const Csr& w)
      : n_(w.n),
        words_(words_of(w.n)),
        row_words_(words_of(w.k)),
        columns_(w.k * words_),
        rows_(w.n * row_words_),
        counts_(w.k),
        items_(w.k),
        one_(words_),
        two_(words_),
        some_(words_) {
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

  // Adds the next group of slots, or all that are left.
  void move_to(std::vector<Slot>* slots) {
    if (is_time_to_finish() && finish(slots)) return;
    const int32_t a = items_[0];
    remove(a);
    slots->push_back({a, {}});
    if (size() && !add_whole(a, slots)) add_split(a, slots);
    while (slots->size() % kGroup) slots->push_back({});
  }

 private:
  // Three columns that make a group with a: the fullest that fit.
  bool add_whole(int32_t a, std::vector<Slot>* slots) {
    rank_partners(a);
    third_ = -1, least_ = INT64_MAX;
    for (const int32_t b : partners_) {
      mark_rows(a, b);
      find_fitting(b);
      int32_t pair[2];
      if (find_pair(pair)) {
        for (const int32_t c : {b, pair[0], pair[1]}) {
          remove(c);
          slots->push_back({c, {}});
        }
        return true;
      }
      note_best(b);
    }
    return false;
  }

  // A second column for a, and as much as fits of a third and fourth. The rest is put back.
  void add_split(int32_t a, std::vector<Slot>* slots) {
    if (third_ < 0) second_ = partners_[0];
    const int32_t b = second_;
    mark_rows(a, b);
    remove(b);
    slots->push_back({b, {}});
    const int32_t c = third_ < 0 ? find_best_part() : third_;
    if (c < 0) return;
    slots->push_back(part_of(c));
    for (int64_t w = 0; w < words_; ++w) {
      const Word before = two_[w];
      two_[w] |= rows_of(c)[w] & ~before & one_[w];
    }
    const int32_t d = find_best_part();
    if (d >= 0) {
      slots->push_back(part_of(d));
      put_back(slots->back());
    }
    put_back((*slots)[slots->size() - (d >= 0 ? 2 : 1)]);
  }

  // Second columns for a, best first. A good one shares few rows with a for so many as it has.
  void rank_partners(int32_t a) {
    count(rows_of(a));
    const size_t tries = std::min<size_t>(size() > kFew ? kTries : kTriesOfFew, shared_.size());
    std::vector<int64_t> costs(shared_.size());
    for (size_t i = 0; i < costs.size(); ++i) costs[i] = cost(shared_[i], counts_[a], items_[i]);
    std::vector<int32_t> order(costs.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + tries, order.end(), [&](int i, int j) {
      return costs[i] != costs[j] ? costs[i] < costs[j] : i < j;
    });
    partners_.clear();
    for (size_t t = 0; t < tries; ++t) partners_.push_back(items_[order[t]]);
  }

  // Of a column that shares rows with others of `rows` rows: half as much again as would be by
  // chance is worth a row.
  int64_t cost(int64_t shared, int64_t rows, int32_t column) const {
    return 2 * n_ * shared - 3 * rows * counts_[column];
  }

  // The rows where a and b have two entries, and where they have one.
  void mark_rows(int32_t a, int32_t b) {
    for (int64_t w = 0; w < words_; ++w) {
      two_[w] = rows_of(a)[w] & rows_of(b)[w];
      one_[w] = rows_of(a)[w] ^ rows_of(b)[w];
    }
  }

  // The fullest columns, b left out, with no entry in the rows of two.
  void find_fitting(int32_t b) {
    std::vector<Word> taken(row_words_);
    for_each(two_.data(), [&](int64_t row) {
      for (int64_t w = 0; w < row_words_; ++w) taken[w] |= rows_[row * row_words_ + w];
    });
    fitting_.clear();
    for (const int32_t c : items_) {
      if (c == b || has(taken.data(), c)) continue;
      fitting_.push_back(c);
      if (fitting_.size() == kMostFitting) break;
    }
  }

  // The fullest fitting columns that are never both in a row of one.
  bool find_pair(int32_t* pair) {
    const auto count = static_cast<int64_t>(fitting_.size());
    for (int64_t i = 0; i + 1 < count; ++i) {
      intersect(fitting_[i]);
      const int64_t j =
          i + 1 +
          find_disjoint(some_.data(), columns_.data(), &fitting_[i + 1], count - i - 1, words_);
      if (j == count) continue;
      pair[0] = fitting_[i], pair[1] = fitting_[j];
      return true;
    }
    return false;
  }

  // some_ = the rows of c that are rows of one.
  void intersect(int32_t c) {
    for (int64_t w = 0; w < words_; ++w) some_[w] = rows_of(c)[w] & one_[w];
  }

  // b and the fitting column that brings the fewest rows to two, if they are the best so far.
  void note_best(int32_t b) {
    const int64_t ones = bits(one_), twos = bits(two_);
    shared_.resize(fitting_.size());
    count_shared(one_.data(), columns_.data(), fitting_.data(), fitting_.size(), words_,
                 shared_.data());
    for (size_t i = 0; i < fitting_.size(); ++i) {
      const int64_t here = cost(shared_[i] + twos, ones, fitting_[i]);
      if (here < least_) least_ = here, second_ = b, third_ = fitting_[i];
    }
  }

  // The column that loses the fewest rows to those of two; -1 if each loses all.
  int32_t find_best_part() {
    count(two_.data());
    const int64_t twos = bits(two_);
    int32_t best = -1;
    int64_t least = INT64_MAX;
    for (size_t i = 0; i < shared_.size(); ++i) {
      const int32_t c = items_[i];
      if (counts_[c] && shared_[i] == counts_[c]) continue;
      if (cost(shared_[i], twos, c) < least) least = cost(shared_[i], twos, c), best = c;
    }
    return best;
  }

  // Takes c from the pool for a slot.
  Slot part_of(int32_t c) {
    remove(c);
    Slot slot{c, std::vector<Word>(words_)};
    for (int64_t w = 0; w < words_; ++w) slot.rest[w] = rows_of(c)[w] & two_[w];
    if (!bits(slot.rest)) slot.rest.clear();
    return slot;
  }

  // What a slot leaves of its column is a column from now on.
  void put_back(const Slot& slot) {
    if (slot.rest.empty()) return;
    const int32_t c = slot.column;
    for (int64_t w = 0; w < words_; ++w) some_[w] = rows_of(c)[w] & ~slot.rest[w];
    for_each(some_.data(), [&](int64_t row) {
      rows_[row * row_words_ + c / kWordBits] &= ~(Word{1} << c % kWordBits);
    });
    std::copy(slot.rest.begin(), slot.rest.end(), &columns_[c * words_]);
    counts_[c] = static_cast<int32_t>(bits(slot.rest));
    items_.insert(std::upper_bound(items_.begin(), items_.end(), counts_[c],
                                   [&](int32_t rows, int32_t o) { return rows > counts_[o]; }),
                  c);
  }

  // Whether to search through all that is left: it has not more quads than can be searched through,
  // as far as one may expect, and is a fourth less than at the last time.
  bool is_time_to_finish() {
    const int64_t left = size();
    if (left > most_left_ || left % kGroup) return false;
    double mean = 0;
    for (const int32_t c : items_) mean += static_cast<double>(counts_[c]) / left;
    const double d = mean / n_, fours = left * (left - 1.) * (left - 2) * (left - 3) / 24;
    if (fours * std::exp(-n_ * (4 * d * d * d * (1 - d) + d * d * d * d)) > kMostQuads)
      return false;
    most_left_ = left * 3 / 4;
    return true;
  }

  // All that is left, whole, if a search finds groups that hold it.
  bool finish(std::vector<Slot>* slots) {
    Quad all;
    for (int64_t i = 0; i < size(); ++i) all.add(i);
    std::vector<Quad> chosen;
    int steps = kMostSteps;
    if (!choose(find_quads(), all, &steps, &chosen)) return false;
    for (const Quad& quad : chosen) {
      for (int i = 0; i < size(); ++i) {
        if (quad.has(i)) slots->push_back({items_[i], {}});
      }
    }
    items_.clear();
    return true;
  }

  // All groups of four that no row has three of; none where there are far more than expected.
  std::vector<Quad> find_quads() {
    std::vector<Quad> quads;
    std::vector<int64_t> at;
    for (int64_t a = 0; a < size(); ++a) {
      if (quads.size() > 4 * kMostQuads) return {};
      for (int64_t b = a + 1; b < size(); ++b) {
        mark_rows(items_[a], items_[b]);
        fitting_.clear(), at.clear();
        for (int64_t c = b + 1; c < size(); ++c) {
          if (find_disjoint(two_.data(), columns_.data(), &items_[c], 1, words_)) continue;
          fitting_.push_back(items_[c]), at.push_back(c);
        }
        const auto count = static_cast<int64_t>(fitting_.size());
        for (int64_t c = 0; c < count; ++c) {
          intersect(fitting_[c]);
          for (int64_t d = c + 1; d < count; ++d) {
            d += find_disjoint(some_.data(), columns_.data(), &fitting_[d], count - d, words_);
            if (d == count) break;
            Quad& quad = quads.emplace_back();
            for (const int64_t i : {a, b, at[c], at[d]}) quad.add(i);
          }
        }
      }
    }
    return quads;
  }

  const Word* rows_of(int32_t column) const { return &columns_[column * words_]; }

  void remove(int32_t column) { items_.erase(std::find(items_.begin(), items_.end(), column)); }

  // shared_ = how many rows the fullest columns share with a.
  void count(const Word* a) {
    shared_.resize(std::min<int64_t>(size(), kMostPartners));
    count_shared(a, columns_.data(), items_.data(), shared_.size(), words_, shared_.data());
  }

  template <class Body>
  void for_each(const Word* rows, const Body& body) const {
    for (int64_t w = 0; w < words_; ++w) {
      for (Word left = rows[w]; left; left &= left - 1) body(w * kWordBits + lowest(left));
    }
  }

  static int64_t bits(const std::vector<Word>& rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0},
                           [](int64_t sum, Word word) { return sum + __builtin_popcountll(word); });
  }

  int64_t n_, words_, row_words_;
  std::vector<Word> columns_, rows_;  // the same bits column by column and row by row
  std::vector<int32_t> counts_;       // rows of a column
  std::vector<int32_t> items_;        // columns in the pool, fullest first
  int64_t most_left_ = kMostLast;     // for the next search
  // Of the group in the making.
  std::vector<Word> one_, two_, some_;
  std::vector<int32_t> partners_, fitting_, shared_;
  int32_t second_ = -1, third_ = -1;
  int64_t least_ = 0;
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
  std::vector<Slot> slots;
  while (pool.size()) {
    if (static_cast<int64_t>(slots.size()) + pool.size() > most_slots) return;
    pool.move_to(&slots);
  }
  for (Slot& slot : slots) {
    const auto at = static_cast<int32_t>(columns_.size());
    columns_.push_back(slot.column);
    if (slot.column < 0) continue;
    last_slot_[slot.column] = at;
    if (!slot.rest.empty()) parts_.push_back({slot.column, at, std::move(slot.rest)});
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
      auto part = std::lower_bound(parts_.begin(), parts_.end(), c,
                                   [](const Part& p, int32_t column) { return p.column < column; });
      while (part != parts_.end() && part->column == c && has(part->rest.data(), row)) ++part;
      places[i] = part != parts_.end() && part->column == c ? part->slot : last_slot_[c];
    }
  }
}

}  // namespace sk
