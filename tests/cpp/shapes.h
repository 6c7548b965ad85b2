// The sizes at which every kernel is tried.
#pragma once

#include <cstdint>

namespace sae::test {

struct Shape {
  int64_t B, D, F, k;
};
// Around the widths of vectors, tiles and batches of rows; k = 1, k = F, no token at all.
inline constexpr Shape kShapes[] = {{0, 3, 5, 2},      {1, 1, 1, 1},     {3, 7, 2, 2},
                                    {5, 16, 33, 33},   {16, 31, 48, 7},  {17, 33, 49, 48},
                                    {33, 32, 97, 5},   {2, 65, 700, 40}, {64, 64, 128, 1},
                                    {7, 129, 211, 13}, {9, 5, 1100, 600}};

}  // namespace sae::test
