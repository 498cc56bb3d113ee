// Which instruction set to run.
#pragma once

#include <string>
#include <vector>

#include "cpu/tables.h"

namespace pynas {

// The instruction sets that were built and that this CPU runs, slowest first.
std::vector<Isa> usable_isas();

// Whether this CPU does as much arithmetic per cycle with vectors of 32 bytes as with 64.
bool narrow_vectors_keep_up();

std::string name_of(Isa isa);

// The instruction set of that name, and the fastest usable one for "". Throws
// std::invalid_argument, with the usable names, for any other.
Isa isa_named(const std::string& name);

}  // namespace pynas
