#include "engine.h"

namespace oc::matmul {

const Matmul OC_CLASS = {};

}  // namespace oc::matmul
