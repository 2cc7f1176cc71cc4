// It looks for the digit: the classifier of cluttered MNIST, glimpse by glimpse (section 4.1,
// Figure 5).

import { addClutter, clutteredPuzzle, softmax } from './math.js'
import { Picture, READ, brightened, pad } from './picture.js'
import {
  Transport,
  button,
  buttons,
  captioned,
  chooser,
  controls,
  digits,
  element,
} from './widget.js'

const whole = n => Math.floor(Math.random() * n)

export default async function () {
  const examples = await digits()
  const images = examples.map(({ pixels }) => pixels)
  const puzzle = new Picture('The puzzle')
  const patch = new Picture('What it sees')
  const verdict = element('p', { class: 'live-words', 'aria-live': 'polite' })
  const body = element('tbody')
  let net = null
  let sheet = null
  let label = null
  let states = []

  const fresh = () => {
    const { height, width } = net.config
    const own = whole(examples.length)
    label = examples[own].label
    sheet = clutteredPuzzle(images, own, 28, height, width, whole)
  }
  const look = () => {
    states = net.look(sheet)
    transport.length(states.length)
    body.replaceChildren(
      ...states.map(({ logits }, t) => {
        const p = softmax(logits)
        const best = p.indexOf(Math.max(...p))
        const cells = Array.from(p, (value, k) =>
          element(
            'td',
            {
              style: `--share: ${(100 * value).toFixed(1)}%`,
              class: k === best && 'best',
              title: `glimpse ${t + 1}: ${k} with ${(100 * value).toFixed(1)} %`,
            },
            element('span', {}, Math.round(100 * value)),
          ),
        )
        return element('tr', {}, element('th', { scope: 'row' }, t + 1), ...cells)
      }),
    )
  }
  const again = () => {
    if (net) {
      look()
      transport.restart()
    }
  }

  const show = t => {
    if (!net) return
    const { height, width, read_size: N } = net.config
    const state = states[t - 1]
    const p = softmax(state.logits)
    const best = p.indexOf(Math.max(...p))
    puzzle.show(sheet, { height, width })
    puzzle.windows(
      states.slice(0, t).map(({ window }, k) => ({ window, kind: READ, faint: k < t - 1 })),
    )
    patch.show(brightened(state.patch), { height: N, width: N })
    patch.label(`What it sees at glimpse ${t}`)
    ;[...body.children].forEach((line, k) => {
      line.classList.toggle('later', k >= t)
      line.classList.toggle('current', k === t - 1)
    })
    const truth = label === null ? '' : ` It is a ${label}.`
    const glimpses = t === 1 ? 'one glimpse' : `${t} glimpses`
    const said = `After ${glimpses} it says ${best}, with ${(100 * p[best]).toFixed(0)} %.`
    verdict.textContent = said + (t === states.length ? truth : '')
  }

  pad(puzzle, () => ({ pixels: sheet, ...net.config }), {
    begin: () => {
      transport.stop()
      puzzle.windows([])
      label = null
    },
    change: () => puzzle.show(sheet, net.config),
    end: again,
    active: () => net !== null,
  })
  const transport = new Transport(show, puzzle, {
    rate: 2,
    fastest: 10,
    unit: 'per s',
    first: 1,
    name: 'Glimpse',
  })
  const make = buttons(
    button('New puzzle', () => {
      if (!net) return
      fresh()
      again()
    }),
    button('Empty sheet', () => {
      if (!net) return
      sheet.fill(0)
      label = null
      look()
      transport.stop()
      transport.to(1)
    }),
    button('Add clutter', () => {
      if (!net) return
      sheet = addClutter(sheet, net.config.height, net.config.width, images, 28, whole)
      again()
    }),
  )
  const networks = await chooser(
    'classifier',
    loaded => {
      const { height, width, classes } = loaded.config
      if (Math.min(height, width) < 28 || classes !== 10)
        throw new Error('the puzzles are digits: they need ten classes, and 28 pixels to each side')
      const same =
        net &&
        net.config.height === loaded.config.height &&
        net.config.width === loaded.config.width
      net = loaded
      if (!same) fresh()
      again()
    },
    model => model.channels === 1,
  )
  networks.ready()

  const heads = Array.from({ length: 10 }, (_, k) => element('th', { scope: 'col' }, k))
  return [
    element(
      'div',
      { class: 'live-columns' },
      element(
        'div',
        {},
        captioned(
          puzzle,
          'A digit among scraps of others. Draw your own on it, about a quarter as high',
          'large',
        ),
      ),
      element(
        'div',
        {},
        controls(networks.element, make, transport.element),
        element(
          'div',
          { class: 'live-glance' },
          captioned(patch, 'What it sees'),
          element(
            'table',
            { class: 'live-table' },
            element('caption', {}, 'Probability of each class in per cent, after every glimpse'),
            element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 't'), ...heads)),
            body,
          ),
        ),
        verdict,
      ),
    ),
  ]
}
