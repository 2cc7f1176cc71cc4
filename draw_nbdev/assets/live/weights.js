// A trained network as files: config.json says its sizes, model.safetensors holds its numbers.

/**
 * A half-precision number (IEEE 754: 1 sign bit, 5 of exponent, 10 of fraction) as an ordinary one.
 */
export function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 1023
  if (exponent === 0) return sign * 2 ** -24 * fraction
  if (exponent === 31) return fraction ? NaN : sign * Infinity
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024)
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => halfToNumber(bits))

/** Bytes of one tensor as float32: type 'F16' or 'F32'. */
function decode(type, bytes, name) {
  if (type === 'F32') return new Float32Array(bytes)
  if (type === 'F16') return Float32Array.from(new Uint16Array(bytes), bits => HALVES[bits])
  throw new Error(`${name} is stored as ${type}: only F16 and F32 are read`)
}

/**
 * The tensors of a safetensors file: 8 bytes with the length of a JSON header, the header, and then
 * the numbers.
 * Returns name -> { shape, data }. Throws an `Error` of one line for a damaged file.
 */
export function readSafetensors(buffer) {
  const damaged = why => new Error(`the weights are damaged: ${why}`)
  if (buffer.byteLength < 8) throw damaged('the file ends within its first 8 bytes')
  const length = Number(new DataView(buffer).getBigUint64(0, true))
  if (8 + length > buffer.byteLength) throw damaged('the file ends within its header')
  let header
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)))
  } catch {
    throw damaged('their header is no JSON')
  }
  const tensors = {}
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue
    const { dtype, shape, data_offsets: offsets } = entry ?? {}
    if (!Array.isArray(shape) || !Array.isArray(offsets))
      throw damaged(`their header says nothing of ${name}`)
    const [from, to] = offsets.map(offset => 8 + length + offset)
    if (!(from <= to && to <= buffer.byteLength)) throw damaged(`the file ends before ${name} does`)
    let data
    try {
      data = decode(dtype, buffer.slice(from, to), name)
    } catch (error) {
      throw error instanceof RangeError ? damaged(`${name} is cut off`) : error
    }
    if (data.length !== shape.reduce((a, b) => a * b, 1))
      throw damaged(`${name} is not of shape ${shape.join(' x ')}`)
    if (!data.every(Number.isFinite)) throw damaged(`${name} is not finite`)
    tensors[name] = { shape, data }
  }
  return tensors
}

const SIZES = ['height', 'width', 'channels', 'glimpses', 'hidden_size', 'read_size']
const KINDS = {
  // What else config.json says of each kind of network
  draw: ['latent_size', 'write_size'],
  classifier: ['classes'],
}

/**
 * Which network a configuration is for, 'draw' or 'classifier'; throws an `Error` for anything
 * else.
 */
export function kindOf(config) {
  const kind =
    config && Object.keys(KINDS).find(kind => KINDS[kind].every(field => field in config))
  if (!kind || 'filters' in config)
    throw new Error('this config.json is of no network that draws or glimpses')
  for (const field of [...SIZES, ...KINDS[kind]])
    if (!Number.isInteger(config[field]) || config[field] < 1)
      throw new Error(`config.json: ${field} must be a whole number from 1`)
  return kind
}

const MISFIT = 'the weights do not fit their config.json'

/**
 * Takes tensors by name and shape, and at the end sees that none is left over: strict, as PyTorch's
 * loading is.
 */
export class Tensors {
  constructor(tensors) {
    this.tensors = tensors
    this.left = new Set(Object.keys(tensors))
  }

  take(name, ...shape) {
    const tensor = this.tensors[name]
    if (!tensor) throw new Error(`${MISFIT}: there is no ${name}`)
    if (tensor.shape.join() !== shape.join())
      throw new Error(`${MISFIT}: ${name} is ${tensor.shape.join(' x ')}, not ${shape.join(' x ')}`)
    this.left.delete(name)
    return tensor.data
  }

  done() {
    if (this.left.size) throw new Error(`${MISFIT}: nothing takes ${[...this.left].join(', ')}`)
  }
}
