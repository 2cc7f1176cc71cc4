// Pixels on a canvas, and windows over them.

import { sigmoid } from './math.js'

export const WRITE = 'write',
  READ = 'read' // Red where the network writes, green where it reads, as in the paper's figures

const SVG = 'http://www.w3.org/2000/svg'
const LARGEST = 1e4 // Far outside every image: windows further away are drawn there

/** An element of SVG. */
export function shape(tag, attributes) {
  return assign(document.createElementNS(SVG, tag), attributes)
}

/** Set attributes of an element. */
export function assign(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  return element
}

/** Logits as probabilities. */
export const probabilities = canvas => canvas.map(sigmoid)

/** Values from -1 to 1 as greys, zero in the middle. */
export const signed = values => values.map(v => (v + 1) / 2)

/** Values with the largest of them at 1, white. */
export function brightened(values) {
  const largest = values.reduce((a, b) => Math.max(a, b), 1e-12)
  return values.map(v => v / largest)
}

/**
 * An image whose pixels stay square and sharp at any size, and over it the windows, in the paper's
 * coordinates: pixels counted from 1.
 */
export class Picture {
  constructor(label) {
    this.element = document.createElement('div')
    this.element.className = 'live-picture'
    this.canvas = document.createElement('canvas')
    this.canvas.setAttribute('role', 'img')
    this.overlay = shape('svg', { 'aria-hidden': 'true', preserveAspectRatio: 'none' })
    this.frames = shape('g', {})
    this.overlay.append(this.frames)
    this.element.append(this.canvas, this.overlay)
    this.label(label)
  }

  /** What a screen reader says of it. */
  label(text) {
    this.canvas.setAttribute('aria-label', text)
  }

  /** Show values in 0..1, one channel or three after each other, of an image with these sizes. */
  show(pixels, { height, width }) {
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width
      this.canvas.height = height
      this.element.style.aspectRatio = `${width} / ${height}`
      this.overlay.setAttribute('viewBox', `0.5 0.5 ${width} ${height}`)
    }
    const size = height * width
    const colour = pixels.length === 3 * size
    const context = this.canvas.getContext('2d')
    const data = context.createImageData(width, height)
    for (let i = 0; i < size; i++) {
      for (let channel = 0; channel < 3; channel++)
        data.data[4 * i + channel] = Math.round(255 * pixels[colour ? channel * size + i : i])
      data.data[4 * i + 3] = 255
    }
    context.putImageData(data, 0, 0)
  }

  /**
   * Draw windows: each { window, kind, faint }. A border is one standard deviation of the filters
   * wide, as in Figures 1 and 5, but an eighth of the picture at most.
   */
  windows(list) {
    const { width, height } = this.canvas
    const widest = Math.min(width, height) / 8
    this.frames.replaceChildren(
      ...list
        .filter(({ window }) => window)
        .flatMap(({ window, kind, faint }) => {
          const side = Math.min((window.N - 1) * window.delta, LARGEST)
          const place = g => Math.max(-LARGEST, Math.min(g, LARGEST)) - side / 2
          const at = {
            x: place(window.gX),
            y: place(window.gY),
            width: side,
            height: side,
            class: `live-window ${kind}${faint ? ' faint' : ''}`,
          }
          const border = Math.min(Math.sqrt(window.variance), widest)
          return [
            shape('rect', { ...at, 'stroke-width': border }),
            shape('rect', { ...at, class: `${at.class} thin` }),
          ]
        }),
    )
  }
}

/** Bars of equal width from zero; `current` is the one that is marked. */
export class Bars {
  constructor(label) {
    this.element = shape('svg', { class: 'live-bars', role: 'img', preserveAspectRatio: 'none' })
    this.label = label
  }

  show(values, current, shown = values.length) {
    const largest = Math.max(...values, 1e-9)
    this.element.setAttribute('viewBox', `0 0 ${values.length} 1`)
    this.element.setAttribute(
      'aria-label',
      `${this.label}: ${values
        .slice(0, shown)
        .map(v => v.toFixed(1))
        .join(', ')}`,
    )
    this.element.replaceChildren(
      ...Array.from(values, (value, i) =>
        shape('rect', {
          x: i + 0.1,
          y: 1 - value / largest,
          width: 0.8,
          height: value / largest,
          class: i === current ? 'current' : i < shown ? '' : 'later',
        }),
      ),
    )
  }
}

/** The pixels of a picture file in 0..1, channel after channel; `channels` 1 takes the first. */
export async function readPicture(url, channels = 1) {
  const image = new Image()
  image.src = url
  await image.decode().catch(() => {
    throw new Error(`${url} could not be loaded`)
  })
  return pixelsOf(image, image.naturalWidth, image.naturalHeight, channels)
}

/** The pixels of anything that can be drawn, scaled and cropped to a size. */
export function pixelsOf(image, width, height, channels) {
  const canvas = document.createElement('canvas')
  canvas.width = width
  canvas.height = height
  const context = canvas.getContext('2d', { willReadFrequently: true })
  const scale = Math.max(width / image.width, height / image.height)
  const [w, h] = [image.width * scale, image.height * scale]
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h)
  const { data } = context.getImageData(0, 0, width, height)
  const pixels = new Float32Array(channels * width * height)
  for (let channel = 0; channel < channels; channel++)
    for (let i = 0; i < width * height; i++)
      pixels[channel * width * height + i] = data[4 * i + channel] / 255
  return { pixels, width, height, channels }
}

/** Put a round, soft dot on an image of one channel; x and y are pixels counted from 1. */
export function dot(image, height, width, x, y, radius = 1.8) {
  for (
    let row = Math.max(1, Math.floor(y - radius));
    row <= Math.min(height, Math.ceil(y + radius));
    row++
  )
    for (
      let column = Math.max(1, Math.floor(x - radius));
      column <= Math.min(width, Math.ceil(x + radius));
      column++
    ) {
      const at = (row - 1) * width + column - 1
      const ink = radius - Math.hypot(row - y, column - x)
      image[at] = Math.max(image[at], Math.min(1, ink))
    }
}

/**
 * Let mouse, pen, finger and keys draw on a picture. `sheet()` gives the image, `begin`, `change`
 * and `end` are told of strokes; nothing is drawn while `active()` is false. */
export function pad(picture, sheet, { begin, change, end, active = () => true }) {
  const { element } = picture
  const cursor = shape('circle', { r: 1.3, class: 'live-cursor' })
  const pen = { x: null, y: null }
  element.classList.add('live-pad')
  element.tabIndex = 0
  element.setAttribute('role', 'application')
  element.setAttribute(
    'aria-label',
    'Drawing pad. Arrow keys move the pen, Space draws a dot, Shift and an arrow a line.',
  )

  const place = event => {
    const box = picture.canvas.getBoundingClientRect()
    const { width, height } = picture.canvas
    return {
      x: ((event.clientX - box.left) / box.width) * width + 0.5,
      y: ((event.clientY - box.top) / box.height) * height + 0.5,
    }
  }
  const line = (from, to) => {
    const { pixels, height, width } = sheet()
    const steps = Math.ceil(2 * Math.hypot(to.x - from.x, to.y - from.y)) || 1
    for (let k = 0; k <= steps; k++)
      dot(
        pixels,
        height,
        width,
        from.x + ((to.x - from.x) * k) / steps,
        from.y + ((to.y - from.y) * k) / steps,
      )
    change()
  }

  let last = null
  element.addEventListener('pointerdown', event => {
    if (event.button || !active()) return
    element.setPointerCapture(event.pointerId)
    begin()
    line((last = place(event)), last)
  })
  element.addEventListener('pointermove', event => {
    if (!last) return
    for (const part of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
      const next = place(part)
      line(last, next)
      last = next
    }
  })
  const lift = () => {
    if (last) {
      last = null
      end()
    }
  }
  element.addEventListener('pointerup', lift)
  element.addEventListener('pointercancel', lift)

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
  const showCursor = () => {
    cursor.setAttribute('cx', pen.x)
    cursor.setAttribute('cy', pen.y)
    picture.overlay.append(cursor)
  }
  element.addEventListener('keydown', event => {
    const move = moves[event.key]
    const { height, width } = sheet()
    if (!active() || (!move && event.key !== ' ')) return
    event.preventDefault()
    pen.x ??= Math.round(width / 2)
    pen.y ??= Math.round(height / 2)
    const from = { ...pen }
    if (move) {
      pen.x = Math.min(width, Math.max(1, pen.x + move[0]))
      pen.y = Math.min(height, Math.max(1, pen.y + move[1]))
    }
    if (!move || event.shiftKey) {
      begin()
      line(from, pen)
      end()
    }
    showCursor()
  })
  element.addEventListener('blur', () => cursor.remove())
}
