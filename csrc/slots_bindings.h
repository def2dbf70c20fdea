// Slots as a Python type. Each extension module has its own: what one makes, the other never takes.
#pragma once

#include "slots.h"

namespace fused_ema {

// Defines Slots and Hold in a module.
void define_slots(py::module_& module);

}  // namespace fused_ema
