// The space between: two samples, and the drawings that come out when their noise is blended.

import { blend, normal } from './math.js'
import { Picture, WRITE, probabilities } from './picture.js'
import {
  Transport,
  button,
  buttons,
  captioned,
  chooser,
  controls,
  element,
  slider,
} from './widget.js'

const STRIP = 9 // Pictures in the strip from one sample to the other

export default async function () {
  const drawing = new Picture('The blend')
  const words = element('span')
  const strip = element('div', { class: 'live-strip' })
  let net = null
  let ends = [3, 7]
  let states = []

  const noise = seed => normal(seed, net.config.glimpses * net.config.latent_size)
  const between = value => net.generate(blend(noise(ends[0]), noise(ends[1]), value))
  const show = t => {
    if (!net) return
    drawing.show(probabilities(states[t].canvas), net.config)
    drawing.windows(
      t && t < states.length - 1 ? [{ window: states[t].writeWindow, kind: WRITE }] : [],
    )
    drawing.label(`${words.textContent}, after step ${t}`)
  }
  const mix = () => {
    if (!net) return
    words.textContent =
      share.value === 0
        ? 'The first sample'
        : share.value === 1
          ? 'The second sample'
          : `${Math.round(100 * share.value)} % of the way from the first to the second`
    states = between(share.value)
    transport.stop()
    transport.length(net.config.glimpses)
    transport.to(net.config.glimpses)
    ;[...strip.children].forEach((thumb, k) =>
      thumb.classList.toggle(
        'here',
        Math.abs(Number(thumb.value) - share.value) < 0.5 / (STRIP - 1),
      ),
    )
  }
  const renew = () => {
    if (!net) return
    strip.replaceChildren(
      ...Array.from({ length: STRIP }, (_, k) => {
        const value = k / (STRIP - 1)
        const small = new Picture(`Blend ${k + 1} of ${STRIP}`)
        small.show(probabilities(between(value).at(-1).canvas), net.config)
        return button(
          small.element,
          () => {
            share.set(value)
            mix()
          },
          { 'aria-label': `Blend ${k + 1} of ${STRIP}`, value },
        )
      }),
    )
    mix()
  }
  const other = k =>
    button(`New ${['first', 'second'][k]} sample`, () => {
      ends[k] = Math.floor(Math.random() * 1e6)
      renew()
    })

  const transport = new Transport(show, drawing, { rate: 24 })
  const share = slider(
    'Blend',
    { min: 0, max: 1, step: 0.01, value: 0.5, format: v => `${Math.round(100 * v)} %` },
    mix,
  )
  const networks = await chooser('draw', loaded => {
    net = loaded
    renew()
  })
  networks.ready()
  return [
    element(
      'div',
      { class: 'live-columns' },
      element('div', {}, captioned(drawing, words, 'large')),
      controls(networks.element, share.element, buttons(other(0), other(1)), transport.element),
    ),
    strip,
  ]
}
