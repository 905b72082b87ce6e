'use strict'
// The search and the calls of the docs page. The API token is read from its field for each call and kept nowhere else.

const tokenField = document.getElementById('token')
const searchField = document.getElementById('search')
const found = document.getElementById('found')
const routes = [...document.querySelectorAll('section.route')]

function search() {
  const words = searchField.value.toLowerCase().split(/\s+/).filter(Boolean)
  let count = 0
  for (const route of routes) {
    const shown = words.every((word) => route.dataset.text.includes(word))
    route.hidden = !shown
    document.getElementById(`nav-${route.id}`).hidden = !shown
    if (shown) count += 1
  }
  for (const group of document.querySelectorAll('[data-group]')) {
    group.hidden = ![...group.querySelectorAll('section.route, li')].some((each) => !each.hidden)
  }
  found.textContent = words.length ? `${count} of ${routes.length} routes` : ''
}

function fill(form, path) {
  return path.slice(1).replace(/\{(\w+)\}/g, (_, name) => {
    const value = form.querySelector(`[data-path="${name}"]`).value.trim()
    if (['', '.', '..'].includes(value)) throw new Error(`Fill in ${name} first.`)
    return encodeURIComponent(value)
  })
}

function prepare(form) {
  const target = new URL(fill(form, form.dataset.route), document.baseURI)
  for (const field of form.querySelectorAll('[data-query]')) {
    if (field.value.trim()) target.searchParams.set(field.dataset.query, field.value.trim())
  }
  const headers = {}
  for (const field of form.querySelectorAll('[data-header]')) {
    if (field.value.trim()) headers[field.dataset.header] = field.value.trim()
  }
  if (tokenField.value.trim()) headers.Authorization = `Bearer ${tokenField.value.trim()}`
  const options = { method: form.dataset.method, headers, cache: 'no-store', credentials: 'omit', redirect: 'error' }
  const body = form.querySelector('textarea')
  if (body && body.value.trim()) {
    options.body = JSON.stringify(JSON.parse(body.value))
    headers['Content-Type'] = 'application/json'
  }
  return [target, { ...options, referrerPolicy: 'no-referrer' }]
}

async function send(form) {
  const output = form.querySelector('output')
  try {
    const [target, options] = prepare(form)
    if ('changes' in form.dataset && !confirm(`${options.method} ${target.pathname} changes this service. Send it?`)) return
    output.textContent = 'Sent …'
    const answer = await fetch(target, options)
    const text = await answer.text()
    let shown = text
    if ((answer.headers.get('Content-Type') || '').includes('json')) shown = JSON.stringify(JSON.parse(text), null, 2)
    output.textContent = `${answer.status} ${answer.statusText}\n${shown}`
  } catch (error) {
    output.textContent = error instanceof SyntaxError ? `The body is not JSON: ${error.message}` : error.message
  }
}

for (const form of document.querySelectorAll('details.try')) {
  form.hidden = false
  form.querySelector('button').addEventListener('click', () => send(form))
}
document.getElementById('tools').hidden = false
searchField.addEventListener('input', search)
// The page that the browser may keep for its back button holds no token.
addEventListener('pagehide', () => {
  tokenField.value = ''
})
