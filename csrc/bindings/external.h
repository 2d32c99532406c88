// External functions that are Python objects.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "engine/external.h"

namespace flatcore {

// `object` has the methods and properties of ExternalFunction, with None for an undefined tensor. They may be
// called in any thread, without the GIL and below autograd.
std::shared_ptr<const ExternalFunction> python_function(pybind11::object object);

}  // namespace flatcore
