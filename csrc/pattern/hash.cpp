#include "hash.h"

#include "../common/machine.h"

namespace sk {

SK_DECLARE(uint64_t hash(const int32_t* words, int64_t size))

uint64_t hash(const int32_t* words, int64_t size) {
  static const auto chosen = SK_CHOSEN(hash);
  return chosen(words, size);
}

}  // namespace sk
