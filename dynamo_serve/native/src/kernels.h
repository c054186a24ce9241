// The plain data that crosses the C boundary, and the table of functions of one instruction set.
// Mirrored by dynamo_serve/native/structs.py; `ds_struct_size` is compared when the library is loaded.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ds {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };
// What a step's time goes to. A norm behind a layer's part counts as that part.
enum Stage : int32_t { EMBED, NORMS, QKV, ROTATE, ATTEND, OUT, GATE_UP, DOWN, HEAD };

struct Spent {
  int64_t nanoseconds[HEAD + 1];  // by `Stage`
};

// y = x W^T + bias, W packed by `pack` in the layout of the instruction set that runs it.
struct Linear {
  const void *weights;
  const float *scales;  // INT8: one per output, else null
  const float *bias;    // one per output, or null
  int32_t outputs, inputs;
  int32_t type;  // of the packed weights
  int32_t gated; // outputs are pairs (gate, up), which the epilogue makes into activation(gate) * up
};

// What attention needs to know of a layer. Pages are [num_pages, page_size, kv_heads, head_size]:
// head_dim numbers, of INT8 those and what they are worth (pages.inl).
struct Attention {
  void *keys, *values;
  const float *sinks;  // a logit per head that carries no value, or null
  float scale, softcap;  // softcap 0: none
  int32_t window;        // tokens that a query sees, itself included; 0: all
  int32_t heads, kv_heads, head_dim, page_size;
  int32_t type;  // of pages: FLOAT32, BFLOAT16 or INT8
};

// Norms are RMS norms: float weights, null where a family has none.
struct Layer {
  Linear qkv, out, gate_up, down;
  Attention attention;
  const float *input_norm, *query_norm, *key_norm, *after_attention_norm;
  const float *before_mlp_norm, *after_mlp_norm;
  const float *cos, *sin;  // [positions, rotary_dim / 2]
};

struct Model {
  const Layer *layers;
  const void *embedding;  // [vocab, hidden], row-major, `embedding_type`
  const float *final_norm;
  Linear head;
  float norm_eps, embedding_scale;
  int32_t num_layers, hidden, intermediate, rotary_dim;
  int32_t activation, embedding_type;
};

// One step of T tokens in R rows (sequences), n of whose tokens are sampled; of m tokens the hidden
// states behind the last norm are wanted.
struct Step {
  const int64_t *token_ids, *positions, *slots;  // [T]; a slot is page * page_size + offset
  const int64_t *samples;                        // [n] indices of tokens
  const int64_t *wanted;                         // [m] indices of tokens
  const int32_t *starts;                         // [R + 1] first token of each row
  const int32_t *page_starts;                    // [R + 1] first entry of each row in `pages`
  const int32_t *pages;                          // page tables end to end
  float *logits;                                 // [n, vocab]
  float *states;                                 // [m, hidden]
  int32_t num_tokens, num_rows, num_samples, num_wanted;
  // Called between two layers, `every` so many nanoseconds, or null. It may run another step, which
  // calls nobody.
  void (*between)();
  int64_t every;
  Spent *spent;  // to which the step's are added, or null
};

// Queries of a step as a caller outside of `forward` has them, [T, heads, head_dim] each.
struct Queries {
  const void *queries;
  void *out;
  int64_t query_stride, out_stride;  // elements from token to token
  int32_t type;                      // FLOAT32 or BFLOAT16, of both
};

struct Kernels {
  const char *name;
  size_t (*packed_bytes)(int32_t outputs, int32_t inputs, int32_t type);
  void (*pack)(void *packed, float *scales, const void *rows, int32_t row_type, int32_t outputs,
               int32_t inputs, int32_t type, int32_t gated);
  void (*forward)(const Model &, const Step &);
  void (*attend)(const Attention &, const Step &, const Queries &);
  void (*linear)(const Linear &, const float *x, float *y, int64_t tokens);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;

}  // namespace ds
