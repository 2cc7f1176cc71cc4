// It draws: a sample from the prior appears step by step (Eqs 13-16, Figures 1 and 7).

import { normal } from './math.js'
import { Picture, WRITE, probabilities } from './picture.js'
import {
  Transport,
  button,
  captioned,
  chooser,
  controls,
  element,
  seedField,
  slider,
} from './widget.js'

const STRIP = 8 // Pictures in the strip under the drawing

/** A window in words. */
const describe = w =>
  w ? `Window at (${w.gX.toFixed(1)}, ${w.gY.toFixed(1)}), stride ${w.delta.toFixed(2)}` : ''

export default async function () {
  const drawing = new Picture('The drawing')
  const strip = element('div', { class: 'live-strip' })
  const words = element('p', { class: 'live-words' })
  let net = null
  let states = []

  const show = t => {
    if (!net) return
    drawing.show(probabilities(states[t].canvas), net.config)
    drawing.windows([{ window: states[t].writeWindow, kind: WRITE }])
    drawing.label(`The drawing after step ${t} of ${states.length - 1}`)
    words.textContent =
      t === 0 ? 'The canvas before the first step' : describe(states[t].writeWindow)
    for (const thumb of strip.children) thumb.classList.toggle('later', Number(thumb.value) > t)
  }
  const thumbnail = t => {
    const small = new Picture(`The drawing after step ${t}`)
    small.show(probabilities(states[t].canvas), net.config)
    small.windows([{ window: states[t].writeWindow, kind: WRITE }])
    const thumb = button(
      small.element,
      () => {
        transport.stop()
        transport.to(t)
      },
      { 'aria-label': `Show step ${t}`, value: t },
    )
    thumb.append(element('span', {}, String(t)))
    return thumb
  }
  const draw = () => {
    if (!net) return
    const { glimpses: T, latent_size: n } = net.config
    states = net.generate(normal(seed.value, T * n).map(z => spread.value * z))
    transport.length(T)
    const count = Math.min(STRIP, T)
    strip.replaceChildren(
      ...Array.from({ length: count }, (_, k) => thumbnail(Math.round((T * (k + 1)) / count))),
    )
  }
  const again = () => {
    draw()
    if (net) transport.restart()
  }

  const renew = button('New sample', () => seed.renew())
  const transport = new Transport(show, drawing, { rate: 16, extra: [renew] })
  const spread = slider(
    'Spread of z',
    { min: 0, max: 2, step: 0.05, value: 1, format: v => v.toFixed(2) },
    () => {
      if (!net) return
      const t = transport.t
      draw()
      transport.stop()
      transport.to(t === 0 ? states.length - 1 : t)
    },
  )
  const seed = seedField('Seed', 0, again)
  const networks = await chooser('draw', loaded => {
    net = loaded
    again()
  })
  networks.ready()
  return [
    element(
      'div',
      { class: 'live-columns' },
      element('div', {}, captioned(drawing, words, 'large')),
      controls(networks.element, transport.element, spread.element, seed.element),
    ),
    strip,
  ]
}
