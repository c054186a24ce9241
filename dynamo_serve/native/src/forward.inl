// A whole decoder step: embedding, layers, head. Activations are `Act`: bfloat16 where the products
// want it, float elsewhere; the residual stream and all sums are float.

// Rows that are read with a stride of a power of two fall into few sets of a cache: pad them.
constexpr int64_t PAD = 32;

template <class Act>
struct Activations {
  Buffer<float> hidden, delta;  // [tokens][hidden + PAD]
  Buffer<Act> x, qkv, mixed, mid;
  Plan plans[2];  // of layers that see everything, and of those with a window
  int64_t rows, hidden_stride, qkv_stride, mixed_stride, mid_stride;

  METHOD void prepare(const Model &m, int64_t tokens) {
    const Attention &a = m.layers[0].attention;
    rows = round_up(tokens, 32);
    hidden_stride = m.hidden + PAD;
    qkv_stride = (a.heads + 2 * a.kv_heads) * a.head_dim + PAD;
    mixed_stride = a.heads * a.head_dim + PAD;
    mid_stride = m.intermediate + PAD;
    hidden.at(rows * hidden_stride);
    delta.at(rows * hidden_stride);
    x.at(rows * hidden_stride);
    qkv.at(rows * qkv_stride);
    mixed.at(rows * mixed_stride);
    mid.at(rows * mid_stride);
  }
};

// Adds up what a step's time goes to, where somebody asks.
struct Watch {
  Spent *spent;
  int64_t began;

  METHOD explicit Watch(Spent *spent) : spent(spent), began(spent ? nanoseconds() : 0) {}
  METHOD void lap(Stage stage) {
    if (spent == nullptr) return;
    const int64_t now = nanoseconds();
    spent->nanoseconds[stage] += now - began;
    began = now;
  }
};

template <class Act, class To>
INLINE void product(const Linear &l, const Act *x, int64_t stride, int64_t tokens, const To &to) {
  if constexpr (sizeof(Act) == 2) {
#if LEVEL >= 2
    narrow_product(l, x, stride, tokens, to);
#endif
  } else if (l.type == FLOAT32) {
    plain_product<float>(l, x, stride, tokens, to);
  } else if (l.type == BFLOAT16) {
    plain_product<bf16>(l, x, stride, tokens, to);
  } else {
    plain_product<int8_t>(l, x, stride, tokens, to);
  }
}

template <class In, class Out>
INLINE void norm_rows(const In *x, const float *weight, float eps, int64_t n, int64_t stride,
                      int64_t tokens, Out *y, bool residual = false) {
  constexpr int64_t BLOCK = 4;
  parallel(divide_up(tokens, BLOCK), [&](int64_t block) {
    for (int64_t t = block * BLOCK; t < smaller(tokens, (block + 1) * BLOCK); t++)
      rms_norm(x + t * stride, weight, eps, n, y + t * stride, residual);
  });
}

// hidden += linear(x), or, in families with a norm behind the layer, hidden += norm(linear(x)).
template <class Act>
INLINE void add_linear(const Model &m, const Linear &l, const float *norm, const Act *x,
                       int64_t stride, int64_t tokens, Activations<Act> &act) {
  const int64_t to = act.hidden_stride;
  if (norm == nullptr) {
    product(l, x, stride, tokens, Sink<float, ADD>{act.hidden.data, to, 0});
    return;
  }
  product(l, x, stride, tokens, Sink<float, REPLACE>{act.delta.data, to, 0});
  norm_rows(act.delta.data, norm, m.norm_eps, m.hidden, to, tokens, act.hidden.data, true);
}

template <class Page, class Act>
INLINE void attend_layer(const Model &m, const Layer &layer, const Step &step,
                         Activations<Act> &act, Watch &watch) {
  const Attention &a = layer.attention;
  rotate_and_write<Act, Page>(m, layer, step, act.qkv.data, act.qkv_stride);
  watch.lap(ROTATE);
  attend<Act, Page>(a, step, act.plans[a.window > 0], act.qkv.data, act.qkv_stride, act.mixed.data,
                    act.mixed_stride);
  watch.lap(ATTEND);
}

template <class Act>
INLINE void run_attention(const Model &m, const Layer &layer, const Step &step,
                          Activations<Act> &act, Watch &watch) {
  switch (layer.attention.type) {
    case FLOAT32: return attend_layer<float>(m, layer, step, act, watch);
    case BFLOAT16: return attend_layer<bf16>(m, layer, step, act, watch);
    default: return attend_layer<int8_t>(m, layer, step, act, watch);
  }
}

template <class Act>
INLINE void run_layer(const Model &m, const Layer &layer, const Step &step, Activations<Act> &act,
                      Watch &watch) {
  const int64_t tokens = step.num_tokens, stride = act.hidden_stride;
  norm_rows(act.hidden.data, layer.input_norm, m.norm_eps, m.hidden, stride, tokens, act.x.data);
  watch.lap(NORMS);
  product(layer.qkv, act.x.data, stride, tokens,
          Sink<Act, REPLACE>{act.qkv.data, act.qkv_stride, 0});
  watch.lap(QKV);
  run_attention(m, layer, step, act, watch);
  add_linear(m, layer.out, layer.after_attention_norm, act.mixed.data, act.mixed_stride, tokens,
             act);
  watch.lap(OUT);
  norm_rows(act.hidden.data, layer.before_mlp_norm, m.norm_eps, m.hidden, stride, tokens,
            act.x.data);
  watch.lap(NORMS);
  product(layer.gate_up, act.x.data, stride, tokens,
          Sink<Act, GATE>{act.mid.data, act.mid_stride, m.activation});
  watch.lap(GATE_UP);
  add_linear(m, layer.down, layer.after_mlp_norm, act.mid.data, act.mid_stride, tokens, act);
  watch.lap(DOWN);
}

template <class Act>
INLINE void plan_windows(const Model &m, const Step &step, Activations<Act> &act) {
  bool planned[2] = {};
  for (int64_t i = 0; i < m.num_layers; i++) {
    const Attention &a = m.layers[i].attention;
    if (!planned[a.window > 0]) plan_segments(act.plans[a.window > 0], a, step);
    planned[a.window > 0] = true;
  }
}

template <class Act>
void forward_with(const Model &m, const Step &step) {
  static Activations<Act> both[2];  // of a step, and of one that runs while it is held
  static bool is_held = false;
  Activations<Act> &act = both[is_held];
  Watch watch(step.spent);
  int64_t looked_at = nanoseconds();
  act.prepare(m, larger(step.num_tokens, step.num_samples));
  plan_windows(m, step, act);
  if (m.embedding_type == FLOAT32)
    embed<float>(m, step, act.hidden.data, act.hidden_stride);
  else
    embed<bf16>(m, step, act.hidden.data, act.hidden_stride);
  watch.lap(EMBED);
  for (int64_t i = 0; i < m.num_layers; i++) {
    run_layer(m, m.layers[i], step, act, watch);
    if (step.between == nullptr || is_held || i + 1 == m.num_layers) continue;
    if (nanoseconds() - looked_at < step.every) continue;
    is_held = true;
    step.between();
    is_held = false;
    looked_at = nanoseconds();
    watch = Watch(step.spent);
  }
  const int64_t n = m.hidden;
  parallel(step.num_wanted, [&](int64_t i) {
    rms_norm(act.hidden.data + step.wanted[i] * act.hidden_stride, m.final_norm, m.norm_eps, n,
             step.states + i * n);
  });
  if (step.num_samples == 0) return;
  for (int64_t i = 0; i < step.num_samples; i++)
    rms_norm(act.hidden.data + step.samples[i] * act.hidden_stride, m.final_norm, m.norm_eps, n,
             act.x.data + i * act.hidden_stride);
  product(m.head, act.x.data, act.hidden_stride, step.num_samples,
          Sink<float, REPLACE>{step.logits, m.head.outputs, 0});
  watch.lap(HEAD);
}

void forward(const Model &m, const Step &step) {
#if LEVEL >= 2
  if (is_narrow(m.head.type)) return forward_with<bf16>(m, step);
#endif
  forward_with<float>(m, step);
}

template <class T, class Page>
void attend_alone(const Attention &a, const Step &step, const Queries &q) {
  static Plan plan;
  plan_segments(plan, a, step);
  attend<T, Page>(a, step, plan, static_cast<const T *>(q.queries), q.query_stride,
                  static_cast<T *>(q.out), q.out_stride);
}

// Pages have the queries' type, or INT8.
void attend_queries(const Attention &a, const Step &step, const Queries &q) {
  const bool whole = a.type == INT8;
  if (q.type == FLOAT32)
    whole ? attend_alone<float, int8_t>(a, step, q) : attend_alone<float, float>(a, step, q);
  else
    whole ? attend_alone<bf16, int8_t>(a, step, q) : attend_alone<bf16, bf16>(a, step, q);
}

// A single layer, for tests and benchmarks: float in, float out.
void linear(const Linear &l, const float *x, float *y, int64_t tokens) {
  const int64_t outputs = l.gated ? l.outputs / 2 : l.outputs;
  const auto run = [&](const auto *input, int64_t stride) {
    if (l.gated)
      product(l, input, stride, tokens, Sink<float, GATE>{y, outputs, SILU});
    else
      product(l, input, stride, tokens, Sink<float, REPLACE>{y, outputs, 0});
  };
#if LEVEL >= 2
  if (is_narrow(l.type)) {
    static Buffer<bf16> narrowed;
    const int64_t stride = l.inputs + PAD;
    narrowed.at(round_up(tokens, 32) * stride);
    for (int64_t t = 0; t < tokens; t++) copy(x + t * l.inputs, narrowed.data + t * stride, l.inputs);
    return run(narrowed.data, stride);
  }
#endif
  run(x, l.inputs);
}
