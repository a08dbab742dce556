// Activations, for one instruction set; after vectors.inl.

// Half of 1 + tanh(u) is sigmoid(2u), and half of 1 + erf(u) is half of erfc(-u): no cancellation.
static inline Floats activate(Floats x, int32_t kind) {
  const Floats zero = {};
  switch (kind) {
    case GELU_TANH: return x / (exp((x + x * x * x * 0.044715f) * -1.5957691216f) + 1.0f);
    case GELU: {  // Abramowitz and Stegun 7.1.26
      const Floats u = magnitude(x) * 0.70710678f, t = 1.0f / (u * 0.3275911f + 1.0f);
      Floats p = fill(1.061405429f);
      p = p * t - 1.453152027f;
      p = p * t + 1.421413741f;
      p = p * t - 0.284496736f;
      p = p * t + 0.254829592f;
      const Floats tail = p * t * exp(-u * u) * 0.5f;
      return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    case RELU: return x < 0.0f ? zero : x;
    case RELU2: return x < 0.0f ? zero : x * x;
    case SIGMOID: return sigmoid(x);
    default: return x / (exp(-x) + 1.0f);
  }
}

// What a gate lets through.
static inline Floats gated(Floats gate, Floats up, int32_t kind) {
  if (kind != SWIGLU_OAI) return activate(gate, kind) * up;
  const Floats limit = fill(7.0f);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (exp(gate * -1.702f) + 1.0f) * (up + 1.0f);
}
