// A token issuer whose types are made from the service's own OpenAPI description (schema.d.ts, by openapi-typescript).
//
// In: the service's URL, a key set, a key; the signer's and the admin's API token in SIGNER and ADMIN.
// Out: one JSON object with the token and with what the other calls answered.

import createClient from 'openapi-fetch'
import type { components, paths } from './schema.js'

declare const process: { argv: string[]; env: Record<string, string> }

const [baseUrl = '', key_set = '', key = ''] = process.argv.slice(2)
const as = (token: string | undefined) =>
  createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } })
const signer = as(process.env['SIGNER'])
const admin = as(process.env['ADMIN'])
const path = { key_set, key }

const body: components['schemas']['JwtRequest'] = { claims: { sub: 'alice', aud: 'shop' }, expires_in: 60 }
const signed = await signer.POST('/v1/key-sets/{key_set}/keys/{key}/jwt', { params: { path }, body })
if (!signed.data || !('token' in signed.data)) throw new Error(JSON.stringify(signed.error))

const grants = await admin.GET('/v1/grants', { params: { query: { key_set, role: 'signer' } } })
const scopes: components['schemas']['GrantedScope'][] = (grants.data?.items ?? []).map((grant) => grant.scope)

const refused = await signer.POST('/v1/key-sets/{key_set}/keys/{key}/jwt', { params: { path }, body: { claims: { exp: 1 } } })
const problem: components['schemas']['Problem'] | undefined = refused.error

const versions = await admin.GET('/v1/key-sets/{key_set}/keys/{key}/versions', {
  params: { path, query: { state: ['active', 'published'] } },
  querySerializer: { array: { style: 'form', explode: false } },
})

// What the description does not allow is no TypeScript either.
// @ts-expect-error a JWT needs claims
const without: components['schemas']['JwtRequest'] = {}
// @ts-expect-error there is no such state
const asleep: paths['/v1/key-sets/{key_set}/keys/{key}/versions']['get']['parameters']['query'] = { state: ['asleep'] }
void [without, asleep]

console.log(
  JSON.stringify({
    token: signed.data.token,
    scopes,
    problem: problem?.type,
    states: versions.data?.items.map((version) => version.state),
  }),
)
