// Runs jobs for tests/test_live.py: node tests/live.mjs ASSETS JOBS RESULTS, the last two JSON. A
// job names a function below and its arguments.
import fs from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const [assets, jobs, results] = process.argv.slice(2)
const math = await import(pathToFileURL(path.join(assets, 'math.js')))
const { Tensors, halfToNumber, readSafetensors } = await import(
  pathToFileURL(path.join(assets, 'weights.js'))
)

const floats = values => Float32Array.from(values)
const bytes = file => {
  const { buffer, byteOffset, length } = fs.readFileSync(file)
  return buffer.slice(byteOffset, byteOffset + length)
}
const network = folder =>
  math.network(
    JSON.parse(fs.readFileSync(path.join(folder, 'config.json'))),
    bytes(path.join(folder, 'model.safetensors')),
  )
const window = w => w && [w.gX, w.gY, w.delta, w.variance, w.gamma]

const run = {
  half: ({ bits }) => bits.map(v => String(halfToNumber(v))),
  window: ({ parameters, N, B, A }) => window(math.attentionWindow(parameters, N, B, A)),
  filterbank: ({ g, delta, variance, N, length }) => math.filterbank(g, delta, variance, N, length),
  read: ({ image, window, B, A }) => math.readPatch(floats(image), window, B, A),
  write: ({ patch, window, B, A }) => math.writePatch(floats(patch), window, B, A),
  lstm: ({ weights, inputs, h, normalised, input, state }) => {
    const cell = new math.LSTM(
      new Tensors(readSafetensors(bytes(weights))),
      'cell',
      inputs,
      h,
      normalised,
    )
    return cell.apply(floats(input), state.map(floats)).map(v => Array.from(v))
  },
  generate: ({ folder, noise }) =>
    network(folder)
      .generate(floats(noise))
      .map(state => ({ canvas: Array.from(state.canvas), window: window(state.writeWindow) })),
  reconstruct: ({ folder, noise, image }) => {
    const x = floats(image)
    const states = network(folder).reconstruct(x, floats(noise))
    const { total, reconstruction, latent, perStep } = math.bound(states, x)
    const steps = states.map(s => ({
      canvas: Array.from(s.canvas),
      mu: Array.from(s.mu ?? []),
      logSigma: Array.from(s.logSigma ?? []),
      read: window(s.readWindow),
      write: window(s.writeWindow),
    }))
    return { steps, total, reconstruction, latent, perStep }
  },
  classify: ({ folder, image }) =>
    network(folder)
      .look(floats(image))
      .map(state => ({
        probabilities: Array.from(math.softmax(state.logits)),
        window: window(state.window),
      })),
  fail: ({ folder }) => {
    try {
      network(folder)
      return null
    } catch (error) {
      return error.message
    }
  },
  normal: ({ seed, count }) => math.normal(seed, count),
  blend: ({ a, b, share }) => math.blend(floats(a), floats(b), share),
  puzzle: ({ digits, own, side, height, width, seed }) => {
    const random = math.uniform(seed)
    return math.clutteredPuzzle(digits.map(floats), own, side, height, width, n =>
      Math.floor(random() * n),
    )
  },
}

const plain = value => (ArrayBuffer.isView(value) ? Array.from(value) : value)
fs.writeFileSync(
  results,
  JSON.stringify(
    JSON.parse(fs.readFileSync(jobs)).map(({ name, ...rest }) => plain(run[name](rest))),
  ),
)
