// One scenario a run: `node openai.mjs chat`. It ends with an exception if the client does not make of a reply what it should.
// Without a name it says which there are.
import assert from "node:assert/strict";

export const url = process.env.SERVER_URL;
export const picture = process.env.PICTURE; // base64 of a green PNG
export const greedy = { temperature: 0 };
export const model = "qwen3";
export const toolUser = "llama"; // copies a city also if the schema is not spelt as it was trained on
export const question = "What is the weather in Paris?";
export const weather = "18 degrees, sunny";
export const numbers = Array.from({ length: 20 }, (_, i) => i + 1).join(" ");
export const colour = "What color is this image?";

export async function run(scenarios) {
  const name = process.argv[2];
  if (name === undefined) console.log(Object.keys(scenarios).join("\n"));
  else {
    assert.ok(name in scenarios, `no scenario ${name}`);
    await scenarios[name]();
  }
}
