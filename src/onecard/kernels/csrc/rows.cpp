#include "engine.h"

namespace oc::rows {

const Rows OC_CLASS = {};

}  // namespace oc::rows
