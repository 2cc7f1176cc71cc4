// The window, to play with: one grid of filters over an image, and all that Eqs 19-26 make of it.

import { filterCentre, filters, readPatch, writePatch } from './math.js'
import { Picture, READ, assign, brightened, pad, pixelsOf, shape } from './picture.js'
import {
  button,
  buttons,
  captioned,
  choice,
  controls,
  digits,
  element,
  marked,
  photograph,
  problem,
  slider,
} from './widget.js'

const clamp = (value, low, high) => Math.min(Math.max(value, low), high)
const fixed = (value, places = 2) =>
  Math.abs(value) >= 1e5 ? value.toExponential(1) : value.toFixed(places)

export default async function () {
  const [examples, photo] = await Promise.all([digits(), photograph()])
  const image = new Picture('The image with the window')
  const patch = new Picture('The patch')
  const back = new Picture('The patch put back')
  const rows = new Picture('The filterbank F_Y')
  const columns = new Picture('The filterbank F_X')
  const numbers = element('dl', { class: 'live-numbers' })
  let sheet = null
  let drawing = false
  let shown = 'digit' // The source of the image
  const w = { gX: 14.5, gY: 14.5, delta: 3, variance: 1, gamma: 1, N: 5 }
  let share = 0 // delta~ (Eq. 24), which stays when N changes, and with it the size of the window

  /** The stride at which the window takes up all of the image. */
  const unit = () => (Math.max(sheet.width, sheet.height) - 1) / Math.max(w.N - 1, 1)

  // ---- What is shown

  const equations = () => {
    const { height: B, width: A } = sheet
    const centres = g => [1, w.N].map(i => fixed(filterCentre(g, w.delta, w.N, i), 1)).join(' … ')
    const { FX, FY } = filters(w, B, A)
    const sums = F => fixed(F.subarray(0, F.length / w.N).reduce((a, b) => a + b, 0))
    const centre = axis => `<i>μ</i><sub>${axis}</sub> = <i>g</i><sub>${axis}</sub>`
    const factor = w.N > 1 ? '(<i>N</i> − 1) ' : ''
    const lines = [
      ['(19)', `${centre('X')} + (<i>i</i> − <i>N</i>/2 − 0.5) <i>δ</i>`, centres(w.gX)],
      ['(20)', `${centre('Y')} + (<i>j</i> − <i>N</i>/2 − 0.5) <i>δ</i>`, centres(w.gY)],
      [
        '(21)',
        'log <i>σ</i><sup>2</sup>, log <i>γ</i>',
        `${fixed(Math.log(w.variance))}, ${fixed(Math.log(w.gamma))}`,
      ],
      [
        '(22)',
        '<i>g̃</i><sub>X</sub> = 2 <i>g</i><sub>X</sub> / (<i>A</i> + 1) − 1',
        fixed((2 * w.gX) / (A + 1) - 1),
      ],
      [
        '(23)',
        '<i>g̃</i><sub>Y</sub> = 2 <i>g</i><sub>Y</sub> / (<i>B</i> + 1) − 1',
        fixed((2 * w.gY) / (B + 1) - 1),
      ],
      [
        '(24)',
        `<i>δ̃</i> = <i>δ</i> ${factor}/ (max(<i>A</i>, <i>B</i>) − 1)`,
        fixed(w.delta / unit()),
      ],
      ['(25)', 'Sum of the first row of <i>F</i><sub>X</sub>', sums(FX)],
      ['(26)', 'Sum of the first row of <i>F</i><sub>Y</sub>', sums(FY)],
    ]
    numbers.replaceChildren(
      ...lines.flatMap(([number, formula, value]) => [
        element('dt', {}, element('span', { class: 'live-number' }, number), marked(formula)),
        element('dd', {}, value),
      ]),
    )
  }

  const frame = shape('rect', { class: 'live-window read grip' })
  const grid = shape('g', { class: 'live-grid' })
  const corner = shape('rect', { class: 'live-corner' })
  const drawWindow = () => {
    const side = (w.N - 1) * w.delta
    const left = w.gX - side / 2
    const top = w.gY - side / 2
    const tip = sheet.width / 20
    image.windows([{ window: w, kind: READ }])
    assign(frame, { x: left, y: top, width: side, height: side })
    assign(corner, { x: left + side - tip / 2, y: top + side - tip / 2, width: tip, height: tip })
    const centres = Array.from({ length: w.N }, (_, i) => i + 1)
    grid.replaceChildren(
      ...centres.flatMap(i =>
        centres.map(j =>
          shape('circle', {
            cx: filterCentre(w.gX, w.delta, w.N, i),
            cy: filterCentre(w.gY, w.delta, w.N, j),
            r: sheet.width / 130,
          }),
        ),
      ),
    )
    image.overlay.append(grid, frame, corner)
  }
  const show = () => {
    const { pixels, height, width } = sheet
    const { FX, FY } = filters(w, height, width)
    image.show(pixels, sheet)
    drawWindow()
    const read = readPatch(pixels, w, height, width)
    patch.show(read, { height: w.N, width: w.N })
    back.show(brightened(writePatch(read, w, height, width)), sheet)
    rows.show(brightened(FY), { height: w.N, width: height })
    columns.show(brightened(FX), { height: w.N, width })
    equations()
  }

  // ---- What moves it

  const plain = { step: 0.1, format: v => fixed(v, 1) }
  const logarithm = { step: 0.05, value: 0, format: v => fixed(Math.exp(v)) } // of sigma^2, gamma
  const follow = (label, range, change) =>
    slider(marked(label), range, value => {
      change(value)
      show()
    })
  const sliders = {
    gX: follow('Column <i>g</i><sub>X</sub>', { min: -7, max: 35, ...plain }, v => (w.gX = v)),
    gY: follow('Row <i>g</i><sub>Y</sub>', { min: -7, max: 35, ...plain }, v => (w.gY = v)),
    delta: follow('Stride <i>δ</i>', { min: 0.1, max: 28, ...plain }, v => {
      w.delta = v
      share = v / unit()
    }),
    variance: follow('Variance <i>σ</i><sup>2</sup>', { min: -3, max: 5, ...logarithm }, v => {
      w.variance = Math.exp(v)
    }),
    gamma: follow('Intensity <i>γ</i>', { min: -2, max: 2, ...logarithm }, v => {
      w.gamma = Math.exp(v)
    }),
    N: follow('Filters <i>N</i>', { min: 1, max: 16, step: 1, value: w.N }, count => {
      w.N = count
      w.delta = clamp(share * unit(), ...bounds('delta'))
      sliders.delta.set(w.delta)
    }),
  }
  const move = (gX, gY) => {
    w.gX = clamp(gX, ...bounds('gX'))
    w.gY = clamp(gY, ...bounds('gY'))
    sliders.gX.set(w.gX)
    sliders.gY.set(w.gY)
    show()
  }
  const widen = delta => {
    w.delta = clamp(delta, ...bounds('delta'))
    share = w.delta / unit()
    sliders.delta.set(w.delta)
    show()
  }
  const bounds = key => [Number(sliders[key].input.min), Number(sliders[key].input.max)]

  let grip = null // What is being dragged, and from where
  const place = event => {
    const box = image.canvas.getBoundingClientRect()
    return {
      x: ((event.clientX - box.left) / box.width) * sheet.width + 0.5,
      y: ((event.clientY - box.top) / box.height) * sheet.height + 0.5,
    }
  }
  image.overlay.addEventListener('pointerdown', event => {
    if (drawing || event.button) return
    const at = place(event)
    grip = event.target === corner ? { corner: true } : { x: at.x - w.gX, y: at.y - w.gY }
    if (event.target !== corner && event.target !== frame) {
      grip = { x: 0, y: 0 } // a press outside calls the window there
      move(at.x, at.y)
    }
    image.overlay.setPointerCapture(event.pointerId)
  })
  image.overlay.addEventListener('pointermove', event => {
    if (!grip) return
    const at = place(event)
    if (grip.corner) widen((2 * Math.max(at.x - w.gX, at.y - w.gY)) / Math.max(w.N - 1, 1))
    else move(at.x - grip.x, at.y - grip.y)
  })
  for (const name of ['pointerup', 'pointercancel'])
    image.overlay.addEventListener(name, () => {
      grip = null
    })
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
  image.overlay.addEventListener('keydown', event => {
    if (drawing) return
    const step = moves[event.key]
    if (step) move(w.gX + step[0], w.gY + step[1])
    else if (event.key === '+') widen(w.delta + 0.2)
    else if (event.key === '-') widen(w.delta - 0.2)
    else return
    event.preventDefault()
  })
  assign(image.overlay, {
    tabindex: 0,
    role: 'application',
    class: 'live-grips',
    'aria-label': 'The window. Arrow keys move it, plus and minus change its stride.',
  })
  image.overlay.removeAttribute('aria-hidden')

  // ---- What it lies on

  const lay = (next, fresh) => {
    sheet = next
    const { width: A, height: B } = sheet
    sliders.gX.range(Math.round(-A / 4), Math.round(1.25 * A), 0.1)
    sliders.gY.range(Math.round(-B / 4), Math.round(1.25 * B), 0.1)
    sliders.delta.range(0.1, Math.max(A, B), 0.1)
    if (fresh) {
      w.gX = (A + 1) / 2
      w.gY = (B + 1) / 2
      w.delta = Math.max(A, B) / 2 / Math.max(w.N - 1, 1)
      share = w.delta / unit()
      w.variance = Math.max(0.5, w.delta / 3) ** 2
    }
    sliders.gX.set(w.gX)
    sliders.gY.set(w.gY)
    sliders.delta.set(w.delta)
    sliders.variance.set(Math.log(w.variance))
    show()
  }
  let turn = 3
  const sources = {
    digit: () => ({
      pixels: examples[20 * (turn++ % 10) + 1].pixels,
      height: 28,
      width: 28,
      channels: 1,
    }),
    photograph: () => photo,
    own: () => ({ pixels: new Float32Array(28 * 28), height: 28, width: 28, channels: 1 }),
  }
  const use = name => {
    problem(panel, null)
    source.select.value = shown = name
    const next = sources[name]()
    const fresh = !sheet || sheet.width !== next.width
    drawing = name === 'own'
    image.element.classList.toggle('live-pad', drawing)
    image.element.tabIndex = drawing ? 0 : -1
    image.overlay.setAttribute('tabindex', drawing ? -1 : 0)
    renew.hidden = name !== 'digit' && name !== 'file'
    renew.textContent = name === 'file' ? 'Another file' : 'Another digit'
    hint.textContent = drawing
      ? 'Draw on the image; the sliders move the window'
      : 'Drag the window, or its corner'
    lay(next, fresh)
  }
  const hint = element('span')
  const renew = button('Another digit', () =>
    source.select.value === 'file' ? choose() : use('digit'),
  )
  /** Ask for a picture file; what is shown stays until there is one. */
  const choose = () => {
    source.select.value = shown
    file.value = ''
    file.click()
  }
  const source = choice(
    'Image',
    [
      ['digit', 'A digit'],
      ['photograph', 'A photograph'],
      ['own', 'Your own drawing'],
      ['file', 'A picture file …'],
    ],
    name => (name === 'file' ? choose() : use(name)),
  )
  const file = element('input', {
    type: 'file',
    accept: 'image/*',
    hidden: true,
    'aria-label': 'A picture file',
    change: async () => {
      const picture = file.files[0] && (await createImageBitmap(file.files[0]).catch(() => null))
      problem(panel, picture ? null : new Error('this file is no picture that the browser knows'))
      if (!picture) return
      sources.file = () => pixelsOf(picture, 100, 100, 3)
      use('file')
    },
  })
  pad(image, () => sheet, { begin() {}, change: show, end() {}, active: () => drawing })
  const panel = controls(
    source.element,
    file,
    buttons(renew),
    ...Object.values(sliders).map(line => line.element),
  )
  use('digit')

  return [
    element(
      'div',
      { class: 'live-columns' },
      element('div', {}, captioned(image, hint, 'large')),
      panel,
    ),
    element(
      'div',
      { class: 'live-columns outcome' },
      captioned(
        patch,
        marked(
          'The patch, <i>γ</i> <i>F</i><sub>Y</sub> <i>x</i> <i>F</i><sub>X</sub><sup>T</sup>',
        ),
      ),
      captioned(
        back,
        marked(
          'Put back, <i>F</i><sub>Y</sub><sup>T</sup> <i>w F</i><sub>X</sub> / <i>γ</i>, brighter',
        ),
      ),
      element(
        'div',
        { class: 'live-banks' },
        captioned(columns, marked('<i>F</i><sub>X</sub>, a filter in each row'), 'wide'),
        captioned(rows, marked('<i>F</i><sub>Y</sub>, a filter in each row'), 'wide'),
      ),
    ),
    numbers,
  ]
}
