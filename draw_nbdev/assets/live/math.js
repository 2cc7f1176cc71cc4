// The mathematics of DRAW (Gregor et al. 2015, arXiv 1502.04623), in the paper's symbols and with
// its equation numbers.
//
// Numbers live in Float32Arrays, matrices row after row, images channel after channel. Pixels are
// counted from 1, as in the paper. A network goes from one state to the next; states are never
// changed, so that every step of a drawing can be kept and shown.

import { Tensors, kindOf, readSafetensors } from './weights.js'

export const sigmoid = x => 1 / (1 + Math.exp(-x))

// ---- Linear maps and the LSTM

/** An affine map W x + b, the paper's W(·). */
export class Linear {
  constructor(tensors, name, inputs, outputs) {
    this.W = tensors.take(`${name}.weight`, outputs, inputs)
    this.b = tensors.take(`${name}.bias`, outputs)
  }

  apply(x) {
    const { W, b } = this
    const n = x.length
    const y = new Float32Array(b.length)
    for (let i = 0, k = 0; i < y.length; i++) {
      let s0 = b[i]
      let s1 = 0
      let s2 = 0
      let s3 = 0
      let j = 0
      // Four sums at once, which the processor adds side by side
      for (; j + 3 < n; j += 4, k += 4) {
        s0 += W[k] * x[j]
        s1 += W[k + 1] * x[j + 1]
        s2 += W[k + 2] * x[j + 2]
        s3 += W[k + 3] * x[j + 3]
      }
      for (; j < n; j++, k++) s0 += W[k] * x[j]
      y[i] = s0 + s1 + s2 + s3
    }
    return y
  }
}

/** Vectors end to end, the paper's [v, w]. */
export function concat(...vectors) {
  const joined = new Float32Array(vectors.reduce((length, vector) => length + vector.length, 0))
  let at = 0
  for (const vector of vectors) {
    joined.set(vector, at)
    at += vector.length
  }
  return joined
}

/** LN: to mean 0 and variance 1 over a vector, then scaled and shifted. */
export function layerNorm(x, weight, bias) {
  let mean = 0
  let variance = 0
  for (const v of x) mean += v / x.length
  for (const v of x) variance += (v - mean) ** 2 / x.length
  return x.map((v, i) => ((v - mean) / Math.sqrt(variance + 1e-5)) * weight[i] + bias[i])
}

/** An LSTM with forget gates (section 2.1), gates in the order input, forget, cell, output. */
export class LSTM {
  constructor(tensors, name, inputs, hidden, normalised = false) {
    this.gates = new Linear(tensors, `${name}.gates`, inputs + hidden, 4 * hidden)
    this.norm =
      normalised && ['weight', 'bias'].map(part => tensors.take(`${name}.norm.${part}`, hidden))
  }

  /** From an input and the state [h, cell] to the next state. */
  apply(input, [h, cell]) {
    const n = h.length
    const gates = this.gates.apply(concat(input, h))
    const next = cell.map(
      (c, k) => sigmoid(gates[n + k]) * c + sigmoid(gates[k]) * Math.tanh(gates[2 * n + k]),
    )
    const shown = this.norm ? layerNorm(next, ...this.norm) : next
    return [shown.map((c, k) => sigmoid(gates[3 * n + k]) * Math.tanh(c)), next]
  }
}

// ---- The window (section 3.2)

// Of g~_X, g~_Y, log sigma^2, log delta~ and log gamma, as in the package's filterbank.py
const LIMITS = [1e3, 1e3, 17, 10, 17]

/**
 * Eqs 21-24: five unconstrained numbers (g~_X, g~_Y, log sigma^2, log delta~, log gamma) become a
 * window of N x N filters on an image of height B and width A.
 */
export function attentionWindow(parameters, N, B, A) {
  const [gX, gY, logVariance, logDelta, logGamma] = Array.from(parameters, (v, i) =>
    Math.min(Math.max(v, -LIMITS[i]), LIMITS[i]),
  )
  return {
    gX: ((A + 1) / 2) * (gX + 1), // Eq. 22
    gY: ((B + 1) / 2) * (gY + 1), // Eq. 23
    delta: ((Math.max(A, B) - 1) / Math.max(N - 1, 1)) * Math.exp(logDelta), // Eq. 24
    variance: Math.exp(logVariance),
    gamma: Math.exp(logGamma),
    N,
  }
}

/** Eqs 19, 20: where the i-th filter is centred on an axis, i = 1..N. */
export const filterCentre = (g, delta, N, i) => g + (i - N / 2 - 0.5) * delta

/** Eqs 25, 26: N Gaussians on pixels 1..length, a row for each, every row summing to 1. */
export function filterbank(g, delta, variance, N, length) {
  const F = new Float32Array(N * length)
  const exponents = new Float64Array(length)
  for (let i = 0; i < N; i++) {
    const mu = filterCentre(g, delta, N, i + 1)
    let largest = -Infinity
    let Z = 0
    for (let a = 0; a < length; a++) {
      exponents[a] = -((a + 1 - mu) ** 2) / (2 * variance)
      largest = Math.max(largest, exponents[a])
    }
    for (let a = 0; a < length; a++) {
      exponents[a] = Math.exp(exponents[a] - largest) // a filter off the image keeps a pixel
      Z += exponents[a]
    }
    for (let a = 0; a < length; a++) F[i * length + a] = exponents[a] / Z
  }
  return F
}

/** Both filterbanks of a window on an image of height B and width A. */
export const filters = ({ gX, gY, delta, variance, N }, B, A) => ({
  FY: filterbank(gY, delta, variance, N, B),
  FX: filterbank(gX, delta, variance, N, A),
})

/**
 * Matrix product of (rows x inner) and (inner x columns); `right` may be given turned, as (columns
 * x inner).
 */
function product(left, right, rows, inner, columns, turned = false) {
  const out = new Float32Array(rows * columns)
  const across = turned ? 1 : columns
  const down = turned ? inner : 1
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) {
      let sum = 0
      for (let k = 0; k < inner; k++) sum += left[i * inner + k] * right[k * across + j * down]
      out[i * columns + j] = sum
    }
  return out
}

/** A matrix turned over. */
function transposed(matrix, rows, columns) {
  const out = new Float32Array(matrix.length)
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) out[j * rows + i] = matrix[i * columns + j]
  return out
}

/** Apply a function to every channel of an image and put the results end to end. */
function eachChannel(image, size, apply) {
  const parts = []
  for (let at = 0; at < image.length; at += size) parts.push(apply(image.subarray(at, at + size)))
  return concat(...parts)
}

/** Eq. 27 for one image: gamma F_Y x F_X^T, an N x N patch for each channel. */
export function readPatch(image, window, B, A) {
  const { N, gamma } = window
  const { FY, FX } = filters(window, B, A)
  return eachChannel(image, B * A, x => product(product(FY, x, N, B, A), FX, N, A, N, true)).map(
    v => gamma * v,
  )
}

/** Eq. 29: 1/gamma F_Y^T w F_X, a picture of height B and width A for each channel. */
export function writePatch(patch, window, B, A) {
  const { N, gamma } = window
  const { FY, FX } = filters(window, B, A)
  const FYT = transposed(FY, N, B)
  return eachChannel(patch, N * N, w => product(FYT, product(w, FX, N, N, A), B, N, A)).map(
    v => v / gamma,
  )
}

// ---- The network (sections 2.1 to 2.3)

/**
 * Deep Recurrent Attentive Writer. `tensors` as from `readSafetensors`; throws an `Error` where
 * they do not fit the configuration.
 */
export class DRAW {
  constructor(config, tensors) {
    const c = (this.config = config)
    const named = new Tensors(tensors)
    const {
      height: B,
      width: A,
      channels,
      hidden_size: h,
      latent_size: z,
      read_size: N,
      write_size: M,
    } = c
    this.pixels = channels * B * A
    if (c.attention) {
      this.readWindow = new Linear(named, 'read.window', h, 5)
      this.writeWindow = new Linear(named, 'write.window', h, 5)
      this.patch = new Linear(named, 'write.patch', h, channels * M * M)
    } else this.canvas = new Linear(named, 'write.canvas', h, this.pixels)
    const features = 2 * (c.attention ? channels * N * N : this.pixels)
    this.encoder = new LSTM(named, 'encoder', features + h, h, c.layer_norm)
    this.posterior = new Linear(named, 'posterior', h, 2 * z)
    this.decoder = new LSTM(named, 'decoder', z, h, c.layer_norm)
    const halves = data => [data.slice(0, h), data.slice(h)]
    this.first = {
      canvas: named.take('initial_canvas', channels, B, A),
      encoder: halves(named.take('initial_encoder', 2, h)),
      decoder: halves(named.take('initial_decoder', 2, h)),
    }
    named.done()
  }

  /** The state before the first step: c_0 and the learned beginnings of both LSTMs. */
  start() {
    return this.first
  }

  /**
   * Eqs 17, 21, 27: what the encoder is given of the image x and the error image x^ = x - sigma(c),
   * and through which window.
   */
  read(x, xHat, hDec) {
    if (!this.config.attention) return { reading: concat(x, xHat), readWindow: null }
    const { height: B, width: A, read_size: N } = this.config
    const readWindow = attentionWindow(this.readWindow.apply(hDec), N, B, A)
    return { reading: readPatch(concat(x, xHat), readWindow, B, A), readWindow }
  }

  /** Eqs 18, 28, 29: what the decoder adds to the canvas, and through which window. */
  write(hDec) {
    if (!this.config.attention) return { update: this.canvas.apply(hDec), writeWindow: null }
    const { height: B, width: A, write_size: N } = this.config
    const writeWindow = attentionWindow(this.writeWindow.apply(hDec), N, B, A)
    return { update: writePatch(this.patch.apply(hDec), writeWindow, B, A), writeWindow }
  }

  /** Eqs 7, 8 (14-16): from a latent z_t to the next canvas. */
  draw(state, z) {
    const decoder = this.decoder.apply(z, state.decoder)
    const { update, writeWindow } = this.write(decoder[0])
    return { ...state, decoder, canvas: state.canvas.map((c, i) => c + update[i]), writeWindow }
  }

  /**
   * Eqs 3-8: one glimpse at the image x. `noise` is standard normal, one number for each of z_t.
   */
  glimpse(state, x, noise) {
    const xHat = x.map((v, i) => v - sigmoid(state.canvas[i])) // Eq. 3
    const { reading, readWindow } = this.read(x, xHat, state.decoder[0]) // Eq. 4
    const encoder = this.encoder.apply(concat(reading, state.decoder[0]), state.encoder) // Eq. 5
    const both = this.posterior.apply(encoder[0])
    const n = noise.length
    const mu = both.subarray(0, n)
    const logSigma = both.subarray(n) // Eqs 1, 2
    const z = mu.map((m, i) => m + Math.exp(logSigma[i]) * noise[i]) // Eq. 6
    return { ...this.draw({ ...state, encoder }, z), xHat, reading, readWindow, mu, logSigma, z }
  }

  /** All states of a sample: `noise` holds z_1..z_T, drawn from the prior (Eq. 13). */
  generate(noise) {
    const states = [this.start()]
    const n = this.config.latent_size
    for (let at = 0; at < noise.length; at += n)
      states.push(this.draw(states.at(-1), noise.subarray(at, at + n)))
    return states
  }

  /** All states while the image x is read and drawn again. */
  reconstruct(x, noise) {
    const states = [this.start()]
    const n = this.config.latent_size
    for (let at = 0; at < noise.length; at += n)
      states.push(this.glimpse(states.at(-1), x, noise.subarray(at, at + n)))
    return states
  }
}

// ---- The bound (section 2.2), in nats

/** Eq. 9: L^x, the cross-entropy of the pixels x in 0..1 under the canvas, summed over them. */
export const reconstructionLoss = (canvas, x) =>
  canvas.reduce(
    (sum, c, i) => sum + Math.max(c, 0) - c * x[i] + Math.log1p(Math.exp(-Math.abs(c))),
    0,
  )

/** Eqs 10, 11, one step: L^z_t, the divergence of the posterior from the standard normal prior. */
export const klDivergence = (mu, logSigma) =>
  mu.reduce((sum, m, i) => sum + (m * m + Math.exp(2 * logSigma[i]) - 2 * logSigma[i] - 1) / 2, 0)

/**
 * Eq. 12 from the states of a reconstruction: L^x after the last step, L^z_t of every step, and
 * their sum.
 */
export function bound(states, x) {
  const perStep = states.slice(1).map(({ mu, logSigma }) => klDivergence(mu, logSigma))
  const latent = perStep.reduce((a, b) => a + b, 0)
  const reconstruction = reconstructionLoss(states.at(-1).canvas, x)
  return { total: reconstruction + latent, reconstruction, latent, perStep }
}

// ---- The classifier of cluttered MNIST (section 4.1)

/** Exponentials that sum to one. */
export function softmax(logits) {
  const largest = Math.max(...logits)
  const powers = Float64Array.from(logits, v => Math.exp(v - largest))
  const Z = powers.reduce((a, b) => a + b, 0)
  return powers.map(v => v / Z)
}

/**
 * Differentiable RAM: an LSTM that looks at an image through a window of its own choice, and names
 * a class after every glimpse.
 */
export class Classifier {
  constructor(config, tensors) {
    const named = new Tensors(tensors)
    const { channels, hidden_size: h, read_size: N, classes } = (this.config = config)
    this.window = new Linear(named, 'window', h, 5)
    this.lstm = new LSTM(named, 'lstm', channels * N * N, h)
    this.classes = new Linear(named, 'classes', h, classes)
    const first = named.take('initial_state', 2, h)
    this.first = { lstm: [first.slice(0, h), first.slice(h)] }
    named.done()
  }

  /**
   * One glimpse: the window that the state chose, the patch seen through it, and the logits of the
   * classes.
   */
  glimpse(state, x) {
    const { height: B, width: A, read_size: N } = this.config
    const window = attentionWindow(this.window.apply(state.lstm[0]), N, B, A)
    const patch = readPatch(x, window, B, A)
    const lstm = this.lstm.apply(patch, state.lstm)
    return { lstm, window, patch, logits: this.classes.apply(lstm[0]) }
  }

  /** All glimpses at an image. */
  look(x) {
    const states = []
    for (let t = 0; t < this.config.glimpses; t++)
      states.push(this.glimpse(states.at(-1) ?? this.first, x))
    return states
  }
}

/** The network that a configuration and the bytes of a safetensors file describe. */
export function network(config, buffer) {
  const kinds = { draw: DRAW, classifier: Classifier }
  return new kinds[kindOf(config)](config, readSafetensors(buffer))
}

// ---- Chance

/** Numbers between 0 and 1 that a seed decides (the generator mulberry32). */
export function uniform(seed) {
  let a = seed >>> 0
  return () => {
    a = (a + 0x6d2b79f5) >>> 0
    let t = Math.imul(a ^ (a >>> 15), a | 1)
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

/** `count` standard normal numbers that a seed decides (Box and Muller). */
export function normal(seed, count) {
  const random = uniform(seed)
  const values = new Float32Array(count)
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - random()))
    const angle = 2 * Math.PI * random()
    values[i] = radius * Math.cos(angle)
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle)
  }
  return values
}

/**
 * Between two independent noises, on the arc on which the blend stays standard normal: share 0
 * gives a, share 1 gives b.
 */
export function blend(a, b, share) {
  const angle = (share * Math.PI) / 2
  return a.map((v, i) => Math.cos(angle) * v + Math.sin(angle) * b[i])
}

// ---- Puzzles of cluttered MNIST (section 4.1)

export const CLUTTER = 8,
  CLUTTER_SIDE = 8 // Crops of other digits, and their side in pixels

/**
 * Add a square of `side` pixels, cut from a digit at (row, column), to an image at another place,
 * and clip at 1.
 */
function paste(image, width, digit, digitSide, side, [fromRow, fromColumn], [row, column]) {
  for (let i = 0; i < side; i++)
    for (let j = 0; j < side; j++) {
      const at = (row + i) * width + column + j
      image[at] = Math.min(1, image[at] + digit[(fromRow + i) * digitSide + fromColumn + j])
    }
}

/**
 * Strew crops of digits over a copy of an image. `whole(n)` gives a whole number from 0 to n - 1.
 */
export function addClutter(image, height, width, digits, side, whole) {
  const cluttered = image.slice()
  for (let k = 0; k < CLUTTER; k++) {
    const source = [whole(side - CLUTTER_SIDE + 1), whole(side - CLUTTER_SIDE + 1)]
    const target = [whole(height - CLUTTER_SIDE + 1), whole(width - CLUTTER_SIDE + 1)]
    paste(cluttered, width, digits[whole(digits.length)], side, CLUTTER_SIDE, source, target)
  }
  return cluttered
}

/** One whole digit among crops of others, all at random places. */
export function clutteredPuzzle(digits, own, side, height, width, whole) {
  const others = digits.filter((_, k) => k !== own)
  const image = addClutter(new Float32Array(height * width), height, width, others, side, whole)
  paste(
    image,
    width,
    digits[own],
    side,
    side,
    [0, 0],
    [whole(height - side + 1), whole(width - side + 1)],
  )
  return image
}
