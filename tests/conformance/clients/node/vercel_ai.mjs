// The Vercel AI SDK, with its provider for servers that speak OpenAI's protocol.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import {
  base, called, model, person, prompt, run, same, steered, steering, tokens, url, weather,
} from "./checks.mjs";

const provider = createOpenAICompatible({
  name: "steerserve",
  baseURL: `${url}/v1`,
  supportsStructuredOutputs: true,
});
const asked = (text, fields = {}) => ({
  model: provider(model),
  prompt: text,
  temperature: 0,
  maxOutputTokens: tokens,
  maxRetries: 0,
  ...fields,
});
const tools = {
  get_weather: tool({
    description: "Get the weather of a city",
    inputSchema: z.object({ city: z.string() }),
  }),
};

await run({
  async chat() {
    same((await generateText(asked(prompt))).text, base);
  },
  async stream() {
    let text = "";
    for await (const piece of streamText(asked(prompt)).textStream) text += piece;
    same(text, base);
  },
  async steering() {
    const providerOptions = { steerserve: { steering } };
    same((await generateText(asked(prompt, { providerOptions }))).text, steered);
  },
  async tool() {
    const demand = { tools, toolChoice: "required", maxOutputTokens: 60 };
    const whole = await generateText(asked(weather, demand));
    const streamed = streamText(asked(weather, demand));
    for (const [call] of [whole.toolCalls, await streamed.toolCalls]) {
      called(call.toolName, call.input);
    }
  },
  async structure() {
    const schema = z.object({ name: z.string(), age: z.number().int() });
    const answer = await generateObject(asked(person, { schema, maxOutputTokens: 60 }));
    schema.parse(answer.object);
  },
});
