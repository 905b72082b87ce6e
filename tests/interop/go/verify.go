// Verifies tokens with golang-jwt and reads their claims into its RegisteredClaims, as a verifier in Go would.
//
// In: one job a line on standard input, {"token", "jwks"} or {"spell": name}.
// Out: one answer a line, {"claims"}, {"spellings"} or {"error"}. "spellings" are the names that encoding/json, which
// golang-jwt decodes with, takes for the name given.
package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"reflect"
	"unicode"

	"github.com/golang-jwt/jwt/v5"
)

type job struct {
	Token string
	Jwks  struct {
		Keys []struct{ Kid, Crv, X, Y string }
	}
	Spell string
}

type answer struct {
	Claims    *jwt.RegisteredClaims `json:"claims,omitempty"`
	Spellings []string              `json:"spellings,omitempty"`
	Error     string                `json:"error,omitempty"`
}

func verify(todo job) (*jwt.RegisteredClaims, error) {
	claims := &jwt.RegisteredClaims{}
	find := func(token *jwt.Token) (any, error) {
		for _, key := range todo.Jwks.Keys {
			if key.Kid == token.Header["kid"] && key.Crv == "P-256" {
				return &ecdsa.PublicKey{Curve: elliptic.P256(), X: number(key.X), Y: number(key.Y)}, nil
			}
		}
		return nil, fmt.Errorf("no key of kid %v", token.Header["kid"])
	}
	_, err := jwt.ParseWithClaims(todo.Token, claims, find, jwt.WithValidMethods([]string{"ES256"}))
	return claims, err
}

func number(text string) *big.Int {
	octets, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		panic(err)
	}
	return new(big.Int).SetBytes(octets)
}

// spellings tries each character that Unicode's simple folding takes for one of name's, and keeps what decodes.
func spellings(name string) []string {
	found := []string{""}
	for _, char := range name {
		var longer []string
		for _, start := range found {
			longer = append(longer, start+string(char))
			for other := unicode.SimpleFold(char); other != char; other = unicode.SimpleFold(other) {
				longer = append(longer, start+string(other))
			}
		}
		found = longer
	}
	field := reflect.StructField{Name: "Field", Type: reflect.TypeOf(0), Tag: reflect.StructTag(`json:"` + name + `"`)}
	into := reflect.StructOf([]reflect.StructField{field})
	var decoded []string
	for _, spelling := range found {
		value := reflect.New(into)
		text, _ := json.Marshal(map[string]int{spelling: 1})
		if json.Unmarshal(text, value.Interface()) == nil && value.Elem().Field(0).Int() == 1 {
			decoded = append(decoded, spelling)
		}
	}
	return decoded
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var todo job
		var done answer
		err := json.Unmarshal(lines.Bytes(), &todo)
		if err == nil && todo.Spell != "" {
			done.Spellings = spellings(todo.Spell)
		} else if err == nil {
			done.Claims, err = verify(todo)
		}
		if err != nil {
			done = answer{Error: err.Error()}
		}
		if err := out.Encode(done); err != nil {
			panic(err)
		}
	}
}
