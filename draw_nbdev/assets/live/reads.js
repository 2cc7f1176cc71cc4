// You draw: the network reads a drawing glimpse by glimpse and draws it again (Eqs 3-12, 27).

import { klDivergence, normal, reconstructionLoss } from './math.js'
import { Bars, Picture, READ, WRITE, pad, probabilities, signed } from './picture.js'
import {
  Transport,
  button,
  captioned,
  chooser,
  controls,
  digits,
  element,
  seedField,
} from './widget.js'

const nats = value => `${value.toFixed(1)} nats`

export default async function () {
  const examples = await digits()
  const paper = new Picture('Your drawing')
  const drawing = new Picture('Its drawing')
  const seen = new Picture('The patch of the image')
  const missed = new Picture('The patch of the error image')
  const errors = new Picture('The error image')
  const bars = new Bars('Nats of each step')
  const terms = Object.fromEntries(
    ['reconstruction', 'KL', 'sum'].map(name => [name, element('output')]),
  )
  const verdict = element('p', { class: 'live-words' })
  const legend = element('p', { class: 'live-legend' })
  const [looks, writes] = [element('span'), element('span')]
  let net = null
  let binary = true
  let sheet = null
  let own = false
  let states = []
  let kl = []

  /** What the network gets: 0 or 1 if it was trained on such images. */
  const image = () => (binary ? sheet.map(v => Number(v > 0.5)) : sheet)
  const read = () => {
    const { glimpses: T, latent_size: n } = net.config
    states = net.reconstruct(image(), normal(seed.value, T * n))
    kl = states.slice(1).map(({ mu, logSigma }) => klDivergence(mu, logSigma))
    transport.length(T)
  }
  const again = () => {
    if (net) {
      read()
      transport.restart()
    }
  }

  const patch = (picture, part, toGrey) => {
    // Reading without the factor gamma: what the filters see
    const { read_size: N, channels } = net.config
    const size = channels * N * N
    const values = part.readWindow && part.reading.map(v => v / part.readWindow.gamma)
    if (values)
      picture.show(toGrey(picture === seen ? values.subarray(0, size) : values.subarray(size)), {
        height: N,
        width: N,
      })
  }
  const show = t => {
    if (!net) return
    const { config } = net
    const state = states[t]
    const next = states[Math.min(t + 1, states.length - 1)]
    const shown = t ? state : next
    const x = image()
    paper.show(x, config)
    paper.windows(t ? [{ window: state.readWindow, kind: READ }] : [])
    drawing.show(probabilities(state.canvas), config)
    drawing.windows(t && t < states.length - 1 ? [{ window: state.writeWindow, kind: WRITE }] : [])
    errors.show(signed(shown.xHat), config)
    errors.windows(t ? [{ window: state.readWindow, kind: READ }] : [])
    patch(seen, shown, values => values)
    patch(missed, shown, signed)
    bars.show(kl, t - 1, t)
    legend.textContent = `Nats of each step, KL(Q ∥ P); the most: ${nats(Math.max(...kl))}`
    const reconstruction = reconstructionLoss(state.canvas, x)
    const latent = kl.slice(0, t).reduce((a, b) => a + b, 0)
    terms.reconstruction.textContent = nats(reconstruction)
    terms.KL.textContent = nats(latent)
    const sum = nats(reconstruction + latent)
    terms.sum.textContent = sum
    verdict.textContent =
      t < states.length - 1
        ? `After ${t} of ${states.length - 1} glimpses`
        : binary
          ? `The bound, drawn once: about ${sum} to send this image.`
          : `The loss, drawn once: ${sum}. For greys it is no price of sending.`
  }

  const clear = () => {
    sheet.fill(0)
    own = true
    paper.show(image(), net.config)
    paper.windows([])
  }
  pad(paper, () => ({ pixels: sheet, ...net.config }), {
    begin: () => {
      transport.stop()
      if (!own) clear()
      paper.windows([])
    },
    change: () => paper.show(image(), net.config),
    end: again,
    active: () => net !== null,
  })
  /** Put example digits in the middle of the sheet; a sheet with room for two gets two. */
  const put = k => {
    const { height, width } = net.config
    sheet = new Float32Array(height * width)
    own = false
    const both = height >= 56 && width >= 56
    const places = both
      ? [
          [2, 2],
          [height - 30, width - 30],
        ]
      : [[Math.floor((height - 28) / 2), Math.floor((width - 28) / 2)]]
    places.forEach(([top, left], j) => {
      const { pixels } = examples[(k + 37 * j) % examples.length]
      for (let i = 0; i < 28 * 28; i++) {
        const row = top + Math.floor(i / 28)
        const column = left + (i % 28)
        if (row >= 0 && row < height && column >= 0 && column < width)
          sheet[row * width + column] = pixels[i]
      }
    })
  }
  const tray = element(
    'div',
    { class: 'live-tray', role: 'group', 'aria-label': 'Example digits' },
    ...Array.from({ length: 10 }, (_, label) => {
      const small = new Picture(`Example of a ${label}`)
      let turn = 1
      const k = () => 20 * label + (turn % 20)
      const face = () => small.show(examples[k()].pixels, { height: 28, width: 28 })
      face()
      return button(
        small.element,
        () => {
          if (!net) return
          put(k())
          turn++
          face()
          again()
        },
        { 'aria-label': `Example of a ${label}` },
      )
    }),
  )

  const transport = new Transport(show, drawing, {
    rate: 16,
    extra: [
      button('Clear', () => {
        if (!net) return
        transport.stop()
        clear()
        read()
        transport.to(0)
      }),
    ],
  })
  const seed = seedField('Seed', 0, again)
  const networks = await chooser(
    'draw',
    (loaded, model) => {
      const before = sheet && own && net && loaded.pixels === net.pixels ? sheet : null
      net = loaded
      binary = model.binary
      if (before) sheet = before
      else put(61)
      const { attention } = net.config
      for (const picture of [seen, missed])
        picture.element.closest('figure').hidden = !attention
      looks.textContent = `Draw here${attention ? '. Green: where it looks' : ''}`
      writes.textContent = `Its drawing${attention ? '. Red: where it writes' : ''}`
      again()
    },
    model => model.channels === 1,
  )
  networks.ready()

  return [
    element(
      'div',
      { class: 'live-columns pair' },
      element('div', {}, captioned(paper, looks, 'large'), tray),
      element('div', {}, captioned(drawing, writes, 'large')),
      controls(controls(networks.element, seed.element), transport.element),
    ),
    element(
      'div',
      { class: 'live-columns pair' },
      element(
        'div',
        { class: 'live-patches' },
        captioned(seen, 'Patch of the image'),
        captioned(missed, 'Patch of the errors'),
        captioned(errors, 'Error image'),
      ),
      element(
        'div',
        { class: 'live-account' },
        legend,
        bars.element,
        element(
          'dl',
          {},
          element('dt', {}, 'Reconstruction so far'),
          element('dd', {}, terms.reconstruction),
          element('dt', {}, 'KL so far'),
          element('dd', {}, terms.KL),
          element('dt', {}, 'Sum'),
          element('dd', {}, terms.sum),
        ),
        verdict,
      ),
    ),
  ]
}
