#include "kernels.h"

#include "../common/machine.h"

namespace sk {

SK_DECLARE(extern const Kernels kKernels)

const Kernels& kernels() {
  static const Kernels& chosen = SK_CHOSEN(kKernels);
  return chosen;
}

}  // namespace sk
