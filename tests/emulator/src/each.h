#pragma once

#include "machine.h"

namespace emulator {

// Writes a function of up to three sources.
template <class Function>
void Step::each(Function function) {
  static constexpr u64 kNone[kLanes] = {};
  u64 scratch[3][kLanes];
  const u64* sources[3] = {kNone, kNone, kNone};
  for (size_t i = 0; i < in_.sources.size() && i < 3; ++i)
    sources[i] = row(in_.sources[i], scratch[i]);
  u64* const to = result(in_.to);
  const u64 *a = sources[0], *b = sources[1], *c = sources[2];
  if (active_ == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = function(a[lane], b[lane], c[lane]);
  } else {
    lanes([&](int lane) { to[lane] = function(a[lane], b[lane], c[lane]); });
  }
}

}  // namespace emulator
