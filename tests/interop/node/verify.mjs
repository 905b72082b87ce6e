// Verifies tokens with jose's createRemoteJWKSet, as a verifier in Node would.
//
// In: one JSON array of jobs a line on standard input, {"token", "jwks_uri", "issuer", "audience", "algorithms"}, and
// {"discover": issuer} in place of a jwks_uri for a verifier that reads the issuer's metadata first.
// Out: one JSON array a line in the same order, {"payload", "header"} or {"error": {"name", "code", "message"}}.
// Every job has a JWKS cache of its own: each is a verifier that has never seen the service before. Jobs with the same
// "cache" are one verifier, which keeps what it has fetched and does not ask again for "cool_down" seconds (jose's 30).

import { webcrypto } from 'node:crypto'
import { createInterface } from 'node:readline'
import { createRemoteJWKSet, jwtVerify } from 'jose'

globalThis.crypto ??= webcrypto // Node 18 has it, but not there

async function jwksUri(issuer) {
  const answer = await fetch(`${issuer}/.well-known/openid-configuration`)
  if (!answer.ok) throw new Error(`issuer metadata: status ${answer.status}`)
  const metadata = await answer.json()
  if (metadata.issuer !== issuer) throw new Error(`issuer metadata names ${metadata.issuer}`)
  return metadata.jwks_uri
}

const kept = new Map()

async function keysOf(job) {
  const known = job.cache && kept.get(job.cache)
  if (known) return known
  const options = job.cool_down === undefined ? {} : { cooldownDuration: job.cool_down * 1000 }
  const keys = createRemoteJWKSet(new URL(job.discover ? await jwksUri(job.discover) : job.jwks_uri), options)
  if (job.cache) kept.set(job.cache, keys)
  return keys
}

async function verify(job) {
  try {
    const keys = await keysOf(job)
    const { payload, protectedHeader } = await jwtVerify(job.token, keys, {
      issuer: job.issuer,
      audience: job.audience,
      algorithms: job.algorithms,
    })
    return { payload, header: protectedHeader }
  } catch (error) {
    return { error: { name: error.name, code: error.code ?? null, message: error.message } }
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await Promise.all(JSON.parse(line).map(verify))))
}
