// Puts a widget into every element with a data-live attribute, when it comes into view.

document.head.append(
  Object.assign(document.createElement('link'), {
    rel: 'stylesheet',
    href: new URL('live.css', import.meta.url),
  }),
)

/**
 * Load the widget of one place. Whatever goes wrong takes one line there, and nothing elsewhere.
 */
async function start(place) {
  place.classList.add('live')
  try {
    const { default: widget } = await import(`./${place.dataset.live}.js`)
    const content = await widget()
    place.replaceChildren(...content)
  } catch (error) {
    const line = Object.assign(document.createElement('p'), {
      className: 'live-problem',
      textContent: error.message,
    })
    line.setAttribute('role', 'alert')
    place.replaceChildren(line)
  }
  place.style.minHeight = ''
  place.dataset.state = 'ready'
}

const observer = new IntersectionObserver(
  entries => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue
      observer.unobserve(target)
      start(target)
    }
  },
  { rootMargin: '100px' },
)

for (const place of document.querySelectorAll('[data-live]')) {
  place.style.minHeight = '34rem' // about what it will take, so that only what is in view is near
  observer.observe(place)
}
