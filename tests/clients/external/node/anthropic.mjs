import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import { colour, greedy, model, numbers, picture, question, run, toolUser, url, weather } from "./scenario.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const Weather = z.object({ city: z.enum(["Paris", "Tokyo"]), sky: z.enum(["clear", "cloudy"]) });
const asked = { model, max_tokens: 300, ...greedy };

await run({
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.ok(ids.includes(model));
  },
  async messages() {
    const reply = await client.messages.create({ ...asked, thinking: { type: "disabled" }, messages: user("Count from 1 to 20.") });
    assert.deepEqual(reply.content, [{ type: "text", text: numbers }]);
    assert.equal(reply.stop_reason, "end_turn");
    assert.ok(reply.usage.output_tokens >= 20);
  },
  async stream() {
    const stream = client.messages.stream({ ...asked, messages: user("Count from 1 to 20.") });
    let pieces = 0;
    stream.on("text", () => pieces++);
    assert.equal(await stream.finalText(), numbers);
    assert.ok(pieces > 5);
  },
  async thinking() {
    const request = { ...asked, temperature: undefined, thinking: { type: "adaptive" } };
    const first = await client.messages.stream({ ...request, messages: user("Hello!") }).finalMessage();
    assert.deepEqual(first.content.map((block) => block.type), ["thinking", "text"]);
    assert.ok(first.content[0].signature);
    const turns = [...user("Hello!"), { role: "assistant", content: first.content }, ...user("Count to 10.")];
    assert.equal((await client.messages.create({ ...request, messages: turns })).stop_reason, "end_turn");
  },
  // The runner asks for a thread first, is told that there are none, and goes on without.
  async tools() {
    const cities = [];
    const tool = betaZodTool({
      name: "get_weather",
      description: "Get the current weather",
      inputSchema: z.object({ city: z.string().describe("The city name") }),
      run: ({ city }) => (cities.push(city), weather),
    });
    const request = { ...asked, model: toolUser, messages: user(question), tools: [tool] };
    const last = await client.beta.messages.toolRunner(request);
    assert.match(last.content[0].text, /18 degrees, sunny/);
    for await (const stream of client.beta.messages.toolRunner({ ...request, stream: true })) await stream.finalMessage();
    assert.deepEqual(cities, ["Paris", "Paris"]);
  },
  async form() {
    const reply = await client.messages.parse({
      ...asked, messages: user("How is the weather?"), output_config: { format: zodOutputFormat(Weather) },
    });
    assert.deepEqual(Weather.parse(reply.parsed_output), reply.parsed_output);
  },
  async picture() {
    const parts = [
      { type: "image", source: { type: "base64", media_type: "image/png", data: picture } },
      { type: "text", text: colour },
    ];
    const reply = await client.messages.create({ ...asked, model: "qwen2_vl", messages: user(parts) });
    assert.equal(reply.content[0].text, "The image is green.");
  },
  async count_tokens() {
    const { input_tokens } = await client.messages.countTokens({ model, messages: user("Hello!") });
    const { usage } = await client.messages.create({ ...asked, messages: user("Hello!") });
    assert.equal(input_tokens, usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens);
  },
  async a_mistake_is_an_exception_of_its_kind() {
    await assert.rejects(client.messages.create({ ...asked, model: "nobody", messages: user("Hello!") }), (error) => {
      assert.ok(error instanceof Anthropic.NotFoundError);
      assert.match(error.requestID, /^req_/);
      return true;
    });
  },
});
