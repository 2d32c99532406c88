// The state of one batch as Python holds it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "engine/state.h"

namespace flatcore {

// A state keeps its program alive.
struct Linearization {
    std::shared_ptr<Program> program;
    std::unique_ptr<State> state;
    double seed;
};

// Throws pybind11::value_error for an unknown name.
Mode mode_named(const std::string& name);

// example_probes.cpp
void bind_example_probes(pybind11::module_ engine, pybind11::class_<Linearization>& linearization);

}  // namespace flatcore
