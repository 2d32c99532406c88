// Headers of torch and pybind11 that most bindings include, compiled once. Every file still includes what it
// uses.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "engine/precompiled.h"
