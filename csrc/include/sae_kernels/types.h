// What crosses from the bindings to the kernels: plain pointers and sizes, the same for every ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sae {

// i16: the lower halves of f32 whose upper ones lie in another matrix.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i16 = 4 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Of the bits of a float.
struct high_half {
  uint16_t bits;
};
struct low_half {
  uint16_t bits;
};

// Sums, values, biases and thresholds of an operand type live in its accumulator type.
template <class E>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class E>
using Acc = typename AccOf<E>::type;

// Which rows of x meet which part of W: those of experts, equal parts of the latents one after the
// other. Expert e has the rows tokens[starts[e]] to tokens[starts[e + 1] - 1]. Without tokens every
// row meets all of W.
struct Routes {
  const int32_t *tokens = nullptr, *starts = nullptr;  // [B], [experts + 1]
  int64_t experts = 1;
};

// By which product in 8 bits the encoders of fp32 operands find out which scores are worth
// computing, where the ISA can: what is selected is the same, bit for bit. Products of bytes are
// added one by one, in pairs (vpmaddubsw), in fours (vpdpbusd) or as tiles (AMX). For few tokens
// `narrow`, the rows of W in 8 bits as few_narrow.h reads them or null, says so.
enum class Screening : int { none = 0, plain = 1, pairs = 2, fours = 3, tiles = 4 };

// Shapes: x [B, D], W [F, D], b and rank_scale [F] or null, floor [B] or null, values and indices
// [B, k]. By magnitude the keys lose their sign; such a call is not screened. Where keys are
// scores, entries below a token's floor may come as latent 0 of score -inf.
struct SelectTopkArgs {
  DType dtype;
  const void *x, *W, *b, *rank_scale;
  const int8_t* narrow;
  const void* floor;
  void* values;
  int32_t* indices;
  int64_t B, D, F, k;
  Routes routes;
  Screening screening;
  bool by_magnitude;
  void* workspace;
  int threads;
};

// Shapes: x [B, D], W [E, D], b [E] or null, experts [B], probabilities [B, E].
struct RouteTop1Args {
  DType dtype;
  const void *x, *W, *b;
  int32_t* experts;
  void* probabilities;
  int64_t B, D, E;
  void* workspace;
  int threads;
};

// Shapes: x [B, D], W [F, D], b [F] or null, bounds [F]. Kept is every h that is not <= its bound.
struct SelectThresholdArgs {
  DType dtype;
  const void *x, *W, *b, *bounds;
  const int8_t* narrow;
  int64_t B, D, F;
  Screening screening;
  void* workspace;
  int threads;
};

struct CanScreenArgs {
  Screening screening;
  int threads;
};

// Codes are [B, K], or, with offsets [B + 1], ragged: one token's entries after the other's.
// Shapes: values and indices as the codes, W [F, D], b_dec [D] or null, group_ends [G] or null,
// out [G, B, D]; the fused form adds target [B, D], group_weights [G] or null, sse [G, B] and
// code_grad as the codes. Sums of several blocks of latents, which divide F, are added at the end.
struct DecodeArgs {
  DType dtype;
  const void* values;
  const int32_t *indices, *offsets;
  const void *W, *b_dec;
  const int32_t* group_ends;
  const void *group_weights, *target;
  void *out, *sse, *code_grad;
  int64_t B, K, D, F, G, blocks;
  bool drop_zeros;
  int threads;
};

// Shapes: grad [G, B, D], indices and out as the codes, W [F, D].
struct CodeGradArgs {
  DType dtype;
  const void* grad;
  const int32_t *indices, *offsets;
  const void* W;
  const int32_t* group_ends;
  void* out;
  int64_t B, K, D, F, G;
  int threads;
};

// Shapes: indices and values [N], offsets [F + 1], entries and rows [N], row_ids [N] or null
// (then an entry's row is entry / entries_per_row), workspace [threads, F] of int32.
struct TransposeArgs {
  DType dtype;
  const int32_t* indices;
  const void* values;
  const int32_t* row_ids;
  int32_t *offsets, *entries, *rows, *workspace;
  int64_t N, F, entries_per_row;
  bool drop_zeros;
  int threads;
};

// One set of codes seen from its latents: entry e = entries[j] of latent f, for j in
// [offsets[f], offsets[f + 1]), adds coef[e] * source[rows[j]]; a null source is a row of ones.
struct Term {
  const int32_t *offsets, *entries, *rows;
  const void *coef, *source;
  DType source_dtype;
};

enum class Norm : int { none = 0, unit = 1, at_most_one = 2 };

struct RowGradArgs {
  DType dtype;  // of coef and out: f32 or f64
  const Term* terms;
  int64_t n_terms, F, width;
  void* out;  // [F, width]
  int threads;
};

// workspace: [threads, 2, width] of the accumulator type.
// hyper: lr, clip scale, 1 - beta1^t, 1 - beta2^t, skip (non-zero: leave everything as it is), t.
struct RowUpdateArgs {
  DType param_dtype, moment_dtype, copy_dtype;
  void *param, *m, *v, *copy;  // [F, width]; copy may be null but beside an i16 param
  const Term* terms;
  int64_t n_terms, F, width;
  const void* row_coef;       // [F, row_parts] or null
  const void* dense_grad;     // [n_dense, width] or null
  const int32_t* dense_slot;  // [F], row of dense_grad or -1; null without dense_grad
  int64_t row_parts = 1;      // equal parts of a row, each with a norm of its own for row_coef
  const double* hyper;
  double beta1, beta2, eps;
  Norm norm;
  int64_t slices;
  bool lazy;
  void* sqnorm;  // [F]: when given, only the squared gradient norms are written
  void* workspace;
  int threads;
};

// What select_threshold found, until the caller has made room for it.
class Selection {
 public:
  virtual ~Selection();  // defined once, outside the ISA variants
  virtual int64_t count() const = 0;
  // Shapes: values and indices [count], offsets [B + 1]; by token, then by latent.
  virtual void write(void* values, int32_t* indices, int32_t* offsets) const = 0;
};

// The kernels of one ISA. A kernel's workspace has as many bytes as its _workspace function says
// for the same arguments, pointers aside. Those that read indices return false when one lies
// outside [0, F), or routes that do not name every token once.
struct KernelTable {
#define SAE_KERNEL(result, name, arguments) result (*name)(const arguments&);
#include "kernels.h"
};

// Scratch is carved from one torch allocation; a cache line keeps neighbours apart.
constexpr size_t kAlign = 64;
inline constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace sae
