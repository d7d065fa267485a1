import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { colour, greedy, model, numbers, picture, question, run, toolUser, url, weather } from "./scenario.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const user = (content) => [{ role: "user", content }];
const Weather = z.object({ city: z.enum(["Paris", "Tokyo"]), sky: z.enum(["clear", "cloudy"]) });
const getWeather = {
  type: "function",
  name: "get_weather",
  description: "Get the current weather",
  parameters: { type: "object", properties: { city: { type: "string", description: "The city name" } }, required: ["city"] },
  strict: false,
};

await run({
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).object, "model");
  },
  async chat() {
    const reply = await client.chat.completions.create({ model, ...greedy, messages: user("Count from 1 to 20.") });
    assert.equal(reply.choices[0].message.content, numbers);
    assert.equal(reply.choices[0].finish_reason, "stop");
    assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  },
  async chat_stream() {
    const stream = client.chat.completions.stream({
      model, ...greedy, messages: user("Count from 1 to 20."), stream_options: { include_usage: true },
    });
    let pieces = 0;
    stream.on("content", () => pieces++);
    const reply = await stream.finalChatCompletion();
    assert.equal(reply.choices[0].message.content, numbers);
    assert.equal(reply.choices[0].message.role, "assistant");
    assert.ok(pieces > 5);
    assert.ok((await stream.totalUsage()).completion_tokens >= 20);
  },
  async chat_tools() {
    const cities = [];
    const { type, strict, ...spec } = getWeather;
    const tool = { type, function: { ...spec, parse: JSON.parse, function: ({ city }) => (cities.push(city), weather) } };
    for (const stream of [false, true]) {
      const runner = client.chat.completions.runTools({ model: toolUser, ...greedy, stream, messages: user(question), tools: [tool] });
      assert.match(await runner.finalContent(), /18 degrees, sunny/);
    }
    assert.deepEqual(cities, ["Paris", "Paris"]);
  },
  async chat_form() {
    const request = { model, ...greedy, messages: user("How is the weather?"), response_format: zodResponseFormat(Weather, "weather") };
    const reply = await client.chat.completions.parse(request);
    assert.deepEqual(Weather.parse(reply.choices[0].message.parsed), reply.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream(request).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, reply.choices[0].message.parsed);
  },
  async chat_picture() {
    const parts = [
      { type: "image_url", image_url: { url: `data:image/png;base64,${picture}` } },
      { type: "text", text: colour },
    ];
    const reply = await client.chat.completions.create({ model: "qwen2_vl", ...greedy, messages: user(parts) });
    assert.equal(reply.choices[0].message.content, "The image is green.");
  },
  async responses() {
    const first = await client.responses.create({ model, ...greedy, input: "My name is Bob." });
    assert.equal(first.status, "completed");
    const second = await client.responses.create({ model, ...greedy, input: "What is my name?", previous_response_id: first.id });
    assert.match(second.output_text, /Bob/);
    assert.equal((await client.responses.retrieve(second.id)).output_text, second.output_text);
    await client.responses.delete(second.id);
  },
  async responses_stream() {
    const stream = client.responses.stream({ model, ...greedy, store: false, input: "Count from 1 to 20." });
    let pieces = 0;
    stream.on("response.output_text.delta", () => pieces++);
    const reply = await stream.finalResponse();
    assert.equal(reply.output_text, numbers);
    assert.ok(pieces > 5);
    assert.ok(reply.usage.output_tokens >= 20);
  },
  async responses_tools() {
    const request = { model: toolUser, ...greedy, store: false, tools: [getWeather] };
    const asked = await client.responses.stream({ ...request, input: question, tool_choice: "required" }).finalResponse();
    const call = asked.output.find((item) => item.type === "function_call");
    assert.deepEqual(JSON.parse(call.arguments), { city: "Paris" });
    const result = { type: "function_call_output", call_id: call.call_id, output: weather };
    const answer = await client.responses.create({ ...request, input: [...user(question), ...asked.output, result] });
    assert.match(answer.output_text, /18 degrees, sunny/);
  },
  async responses_form() {
    const reply = await client.responses.parse({
      model, ...greedy, store: false, input: "How is the weather?", text: { format: zodTextFormat(Weather, "weather") },
    });
    assert.deepEqual(Weather.parse(reply.output_parsed), reply.output_parsed);
  },
  async embeddings() {
    const { data } = await client.embeddings.create({ model: "tiny_bert", input: ["weather in Paris", "Count to 10."] });
    assert.equal(data.length, 2);
    const length = data[0].embedding.reduce((sum, x) => sum + x * x, 0); // it asks for base64 of itself and reads it
    assert.ok(Math.abs(length - 1) < 1e-4);
  },
  async a_mistake_is_an_exception_of_its_kind() {
    await assert.rejects(client.chat.completions.create({ model: "nobody", messages: user("Hello!") }), (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, "model_not_found");
      assert.match(error.requestID, /^req_/);
      return true;
    });
  },
});
