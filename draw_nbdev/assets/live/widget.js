// What the widgets have in common: controls, networks loaded when they are chosen, and steps that
// play.

import { network } from './math.js'
import { readPicture } from './picture.js'

/** An element with attributes and children; functions become listeners. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') made.addEventListener(name, value)
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? '' : value)
  }
  made.append(...children)
  return made
}

/**
 * Text with marks of HTML, as symbols need them; for what is written in these files alone, never
 * for a reader's text.
 */
export function marked(text) {
  const template = document.createElement('template')
  template.innerHTML = text
  return element('span', {}, template.content)
}

// ---- Controls

let count = 0

/** A label, a control and what it says, in one line of the grid of controls. */
function row(label, control, ...rest) {
  control.id = `live-${++count}`
  return element(
    'div',
    { class: 'live-row' },
    element('label', { for: control.id }, label),
    control,
    ...rest,
  )
}

/**
 * A slider with its value beside it. `changed` gets the number; `set` changes it without telling.
 */
export function slider(label, { min, max, step, value, format = String }, changed) {
  const input = element('input', {
    type: 'range',
    min,
    max,
    step,
    value,
    input: () => {
      say()
      changed(Number(input.value))
    },
  })
  const output = element('output')
  const say = () => {
    output.textContent = format(Number(input.value))
    input.setAttribute('aria-valuetext', output.textContent)
  }
  const set = number => {
    input.value = number
    say()
  }
  const range = (low, high, width = step) => {
    input.min = low
    input.max = high
    input.step = width
    say()
  }
  const line = row(label, input, output)
  say()
  return {
    element: line,
    input,
    set,
    range,
    get value() {
      return Number(input.value)
    },
  }
}

export const button = (label, pressed, attributes = {}) =>
  element('button', { type: 'button', click: pressed, ...attributes }, label)

/** A list to choose from: `options` are [value, text]. */
export function choice(label, options, changed) {
  const select = element(
    'select',
    { change: () => changed(select.value) },
    ...options.map(([value, text]) => element('option', { value }, text)),
  )
  return { element: row(label, select), select }
}

/** A whole number from 0, typed; another number gets the browser's line and changes nothing. */
export function seedField(label, value, changed) {
  const read = () => {
    if (!input.checkValidity()) return
    value = Number(input.value)
    changed(value)
  }
  const input = element('input', {
    type: 'number',
    min: 0,
    max: 999999,
    step: 1,
    value,
    required: true,
    input: read,
    change: () => input.reportValidity(),
    inputmode: 'numeric',
  })
  const renew = () => {
    input.value = Math.floor(Math.random() * 1e6)
    read()
  }
  return {
    element: row(label, input),
    renew,
    get value() {
      return value
    },
  }
}

export const buttons = (...children) => element('div', { class: 'live-buttons' }, ...children)
export const controls = (...children) => element('div', { class: 'live-controls' }, ...children)

/** A picture with a line of text under it. */
export const captioned = (picture, text, kind = '') =>
  element(
    'figure',
    { class: `live-figure ${kind}` },
    picture.element,
    element('figcaption', {}, text),
  )

/** Say in one line what went wrong. */
export function problem(place, error) {
  place.querySelector(':scope > .live-problem')?.remove()
  if (error) place.append(element('p', { class: 'live-problem', role: 'alert' }, error.message))
}

// ---- Networks and pictures

const home = new URL('.', import.meta.url)
const once = new Map()

/** The same promise for the same key, unless it failed. */
function remember(key, make) {
  if (!once.has(key))
    once.set(
      key,
      make().catch(error => {
        once.delete(key)
        throw error
      }),
    )
  return once.get(key)
}

async function fetched(path) {
  const answer = await fetch(new URL(path, home)).catch(() => null)
  if (!answer?.ok) throw new Error(`${path} could not be loaded`)
  return answer
}

/** What networks there are: a list of { name, title, kind, bytes, binary }. */
export const models = () => remember('models', async () => (await fetched('models.json')).json())

/** A configuration; throws an `Error` of one line for a damaged one. */
async function readConfig(path) {
  const answer = await fetched(path)
  return answer.json().catch(() => {
    throw new Error('its config.json is damaged')
  })
}

/** The bytes of a file of about `size` bytes; `progress` is told the share that has arrived. */
async function readBytes(path, size, progress) {
  const reader = (await fetched(path)).body.getReader()
  const parts = []
  for (let arrived = 0; ;) {
    const { done, value } = await reader.read()
    if (done) return new Blob(parts).arrayBuffer()
    parts.push(value)
    arrived += value.length
    progress(arrived / size)
  }
}

/** A network by its name. */
export const load = (name, bytes, progress = () => {}) =>
  remember(`weights ${name}`, async () => {
    const folder = `weights/${encodeURIComponent(name)}`
    const config = readConfig(`${folder}/config.json`)
    const weights = readBytes(`${folder}/model.safetensors`, bytes, progress)
    return network(...(await Promise.all([config, weights])))
  })

/**
 * A list of networks, the first of them loaded at once; `chosen` gets each that has arrived. A
 * damaged one says so, and the last stays.
 */
export async function chooser(kind, chosen, fits = () => true) {
  const list = (await models()).filter(model => model.kind === kind && fits(model))
  if (!list.length) throw new Error('there is no network for this here')
  const bar = element('progress', {
    max: 1,
    value: 0,
    hidden: true,
    'aria-label': 'loading weights',
  })
  let wanted = null
  const take = async name => {
    const model = (wanted = list.find(model => model.name === name))
    problem(frame, null)
    bar.value = 0
    bar.hidden = false
    try {
      const net = await load(name, model.bytes, share => {
        if (model === wanted) bar.value = share
      })
      if (model === wanted) await chosen(net, model)
    } catch (error) {
      if (model === wanted) problem(frame, new Error(`${model.title}: ${error.message}`))
    } finally {
      if (model === wanted) bar.hidden = true
    }
  }
  const { element: line, select } = choice(
    'Network',
    list.map(({ name, title, bytes }) => [name, `${title} · ${(bytes / 1e6).toFixed(1)} MB`]),
    take,
  )
  const frame = element('div', { class: 'live-chooser' }, line, bar)
  return { element: frame, select, ready: () => take(list[0].name) }
}

const SIDE = 28
const EACH = 20 // The example digits: 20 of each class, a row of the file for each

/** Example digits with values in 0..1, in order of their classes, each { pixels, label }. */
export const digits = () =>
  remember('digits', async () => {
    const { pixels, width, height } = await readPicture(new URL('digits.png', home))
    const list = []
    for (let top = 0; top < height; top += SIDE)
      for (let left = 0; left < SIDE * EACH; left += SIDE) {
        const digit = new Float32Array(SIDE * SIDE)
        for (let i = 0; i < SIDE; i++)
          digit.set(
            pixels.subarray((top + i) * width + left, (top + i) * width + left + SIDE),
            i * SIDE,
          )
        list.push({ pixels: digit, label: top / SIDE })
      }
    return list
  })

export const photograph = () =>
  remember('photograph', () => readPicture(new URL('photograph.png', home), 3))

// ---- Steps that play

const moving = () => !matchMedia('(prefers-reduced-motion: reduce)').matches

/**
 * Play, pause, step, and sliders for the step, from `first` to T, and for the speed. `show(t)` is
 * called for every step that is shown. It rests while `picture`, where they appear, is out of
 * view.
 */
export class Transport {
  constructor(
    show,
    picture,
    { rate, fastest = 60, unit = 'steps/s', first = 0, name = 'Step', extra = [] },
  ) {
    Object.assign(this, { show, rate, first, playing: false, visible: true, at: 0 })
    this.play = button('Play', () => (this.playing ? this.stop() : this.start()), {
      class: 'live-play',
    })
    this.next = button('Step', () => {
      this.stop()
      this.to(this.t < this.steps ? this.t + 1 : this.first)
    })
    this.position = slider(
      name,
      { min: first, max: 1, step: 1, value: first, format: t => `${t} of ${this.steps ?? 1}` },
      t => {
        this.stop()
        this.to(t)
      },
    )
    this.element = element(
      'div',
      { class: 'live-transport' },
      buttons(this.play, this.next, ...extra),
      this.position.element,
      slider(
        'Speed',
        { min: 1, max: fastest, step: 1, value: rate, format: v => `${v} ${unit}` },
        v => {
          this.rate = v
        },
      ).element,
    )
    this.length(1)
    new IntersectionObserver(entries => {
      this.visible = entries.at(-1).isIntersecting // of several at once, the latest
      if (this.visible && this.playing) this.tick()
    }).observe(picture.element)
  }

  length(steps) {
    this.steps = steps
    this.position.range(this.first, steps)
  }

  to(t) {
    this.t = t
    this.position.set(t)
    this.show(t)
  }

  /** Play from the beginning; show the end at once to readers who asked for little motion. */
  restart() {
    this.stop()
    if (!moving()) return this.to(this.steps)
    this.to(this.first)
    this.start()
  }

  start() {
    if (this.t === undefined) return // nothing has been shown yet
    if (this.t >= this.steps) this.to(this.first)
    this.playing = true
    this.play.textContent = 'Pause'
    this.last = performance.now()
    this.at = this.t
    this.tick()
  }

  stop() {
    this.playing = false
    this.play.textContent = 'Play'
    cancelAnimationFrame(this.frame)
  }

  tick() {
    cancelAnimationFrame(this.frame)
    this.frame = requestAnimationFrame(now => {
      if (!this.playing || !this.visible) return
      this.at = Math.min(
        this.steps,
        this.at + (Math.min(Math.max(now - this.last, 0), 250) / 1000) * this.rate,
      )
      this.last = now
      if (Math.floor(this.at) !== this.t) this.to(Math.floor(this.at))
      if (this.t >= this.steps) this.stop()
      else this.tick()
    })
  }
}
