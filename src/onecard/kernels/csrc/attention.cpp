#include "engine.h"

namespace oc::attention {

const Attention OC_CLASS = {};

}  // namespace oc::attention
